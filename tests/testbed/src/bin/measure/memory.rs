//! What Envoy needs to start, and what it holds: with and without the module, with many limit keys, and after a soak.

use std::time::Instant;

use crate::load::load;
use crate::report::median;
use crate::usage::{cpu, resident};
use crate::variants::{self, Variant};

const ROUNDS: usize = 9;
const WORKERS: u32 = 2;
const CONNECTIONS: u64 = 16;
const KEYS: u64 = 100_000;
/// Few enough to take no memory, and enough for each to stay within its limit.
const FEW: u64 = 1000;
const SOAK: u64 = 1_000_000;

/// Start by start: milliseconds until it serves, milliseconds of CPU time until then, MiB resident.
#[derive(Default)]
struct Starts {
    elapsed: Vec<f64>,
    cpu: Vec<f64>,
    resident: Vec<f64>,
}

pub async fn measure() -> Result<String, String> {
    let upstream = variants::start_upstream().await?;
    let upstream = upstream.address("upstream");
    Ok(format!("{}\n{}", start(upstream).await?, soak(upstream).await?))
}

async fn start(upstream: std::net::SocketAddr) -> Result<String, String> {
    let variants = [variants::router(), variants::empty(), variants::everything()];
    let mut starts: [Starts; 3] = Default::default();
    for round in 0..ROUNDS {
        for turn in 0..variants.len() {
            let index = (turn + round) % variants.len();
            let begun = Instant::now();
            let envoy = variants::start(variants::options(1), &variants[index..=index], upstream).await?;
            starts[index].elapsed.push(begun.elapsed().as_secs_f64() * 1e3);
            starts[index].cpu.push(cpu(&envoy)?.as_secs_f64() * 1e3);
            starts[index].resident.push(resident(&envoy)?);
        }
    }
    let mut table = format!(
        "Starts of Envoy with one worker, until the worker serves: medians of {ROUNDS} alternating rounds; the ratios are \
         medians, too, of the rounds' ratios to the empty filter.\n\n\
         | | start, ms | ratio | CPU time, ms | ratio | resident, MiB |\n|---|---:|---:|---:|---:|---:|\n"
    );
    for (Variant { name, .. }, start) in variants.iter().zip(&starts) {
        table += &format!(
            "| {name} | {:.0} | {:.2} | {:.0} | {:.2} | {:.1} |\n",
            median(&start.elapsed),
            ratio(&start.elapsed, &starts[1].elapsed),
            median(&start.cpu),
            ratio(&start.cpu, &starts[1].cpu),
            median(&start.resident),
        );
    }
    Ok(table)
}

/// The median of the rounds' ratios.
pub fn ratio(values: &[f64], base: &[f64]) -> f64 {
    median(&values.iter().zip(base).map(|(value, base)| value / base).collect::<Vec<_>>())
}

async fn soak(upstream: std::net::SocketAddr) -> Result<String, String> {
    let mut table = format!(
        "Resident memory of Envoy with {WORKERS} workers, in MiB, as the requests go on. First {KEYS} requests of {FEW} \
         users, then {SOAK} of {KEYS} users in turn.\n\n\
         | | at start | few users | each user once | 250,000 | 500,000 | 750,000 | 1,000,000 |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|\n"
    );
    for variant in [variants::router(), variants::lasting_limit(), variants::everything()] {
        let envoy = variants::start(variants::options(WORKERS), std::slice::from_ref(&variant), upstream).await?;
        let address = envoy.address(variant.id);
        let mut row = vec![resident(&envoy)?];
        let mut run = |count: u64, users: u64| -> Result<(), String> {
            tokio::task::block_in_place(|| load(address, CONNECTIONS, count, users))?;
            row.push(resident(&envoy)?);
            Ok(())
        };
        run(KEYS, FEW)?;
        run(KEYS, KEYS)?;
        // Each stretch begins with the first user again; so all of them come in each.
        run(SOAK / 4 - KEYS, KEYS)?;
        for _ in 1..4 {
            run(SOAK / 4, KEYS)?;
        }
        let row: Vec<String> = row.iter().map(|mib| format!("{mib:.1}")).collect();
        table += &format!("| {} | {} |\n", variant.name, row.join(" | "));
    }
    Ok(table)
}
