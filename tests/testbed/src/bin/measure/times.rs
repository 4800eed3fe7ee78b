//! CPU time and latency, side by side with h2load.
//!
//! All variants are up at once and idle, and are loaded in turn. A ratio is taken within one round, whose bursts follow
//! each other closely; the order moves on with each round. A second router tells what a difference of nothing looks
//! like.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use trimtab_testbed::browser::{HEADERS, PATH};

use crate::memory::ratio;
use crate::report::{median, quantile};
use crate::usage::cpu;
use crate::variants;

const ROUNDS: usize = 24;
const BURST: u32 = 2000;
const WARM_UP: u32 = 10_000;
const CONNECTIONS: u32 = 8;

/// Burst by burst, in microseconds.
#[derive(Default)]
struct Times {
    cpu: Vec<f64>,
    middle: Vec<f64>,
    tail: Vec<f64>,
}

pub async fn measure() -> Result<String, String> {
    let log = tempfile::NamedTempFile::new().map_err(|error| format!("no temporary file: {error}"))?;
    let upstream = variants::start_upstream().await?;
    let upstream = upstream.address("upstream");
    let variants = [
        variants::router(),
        variants::router_again(),
        variants::native(),
        variants::lua(),
        variants::empty(),
        variants::limit(),
        variants::request_side(),
        variants::everything(),
    ];
    let mut envoys = Vec::new();
    for variant in &variants {
        let envoy = variants::start(variants::options(1), std::slice::from_ref(variant), upstream).await?;
        burst(envoy.address(variant.id), WARM_UP, log.path())?;
        envoys.push((envoy, Times::default()));
    }
    for round in 0..ROUNDS {
        for turn in 0..variants.len() {
            let index = (turn + round) % variants.len();
            let (envoy, times) = &mut envoys[index];
            let before = cpu(envoy)?;
            let latencies = burst(envoy.address(variants[index].id), BURST, log.path())?;
            times.cpu.push((cpu(envoy)? - before).as_secs_f64() * 1e6 / f64::from(BURST));
            times.middle.push(quantile(&latencies, 0.5));
            times.tail.push(quantile(&latencies, 0.99));
        }
    }
    let mut table = format!(
        "Envoys of one worker, h2load with {CONNECTIONS} connections (HTTP/1), {ROUNDS} alternating rounds of {BURST} \
         requests each. Medians over the rounds, in microseconds, and the medians of the rounds' ratios to the router. \
         The second router shows how far nothing moves them.\n\n\
         | | CPU a request | ratio | latency, p50 | ratio | p99 | ratio |\n|---|---:|---:|---:|---:|---:|---:|\n"
    );
    let base = &envoys[0].1;
    for (variant, (_, times)) in variants.iter().zip(&envoys) {
        table += &format!("| {} ", variant.name);
        for (values, base) in [(&times.cpu, &base.cpu), (&times.middle, &base.middle), (&times.tail, &base.tail)] {
            table += &format!("| {:.0} | {:.2} ", median(values), ratio(values, base));
        }
        table += "|\n";
    }
    Ok(table)
}

/// The latencies of a burst's requests, all of which have to succeed.
fn burst(address: SocketAddr, count: u32, log: &Path) -> Result<Vec<f64>, String> {
    // h2load appends to the file.
    std::fs::write(log, "").map_err(|error| format!("{}: {error}", log.display()))?;
    let mut command = Command::new("h2load");
    command.args(["--h1", "--requests", &count.to_string(), "--clients", &CONNECTIONS.to_string()]);
    command.arg("--log-file").arg(log);
    for (name, value) in HEADERS {
        command.args(["--header", &format!("{name}: {value}")]);
    }
    let output = command.arg(format!("http://{address}{PATH}")).output();
    let output = output.map_err(|error| format!("cannot run h2load: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !said.contains(&format!("status codes: {count} 2xx")) {
        return Err(format!("expected {count} answers of 2xx: {said}{}", String::from_utf8_lossy(&output.stderr)));
    }
    let lines = std::fs::read_to_string(log).map_err(|error| format!("{}: {error}", log.display()))?;
    // When it began, the status, how long it took.
    let latencies = lines.lines().filter_map(|line| line.split('\t').nth(2)?.parse().ok());
    Ok(latencies.collect())
}
