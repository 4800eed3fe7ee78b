//! Instructions a request, counted by callgrind.
//!
//! Envoy runs under valgrind with one worker, and its busiest thread is that worker. The figure is the difference of
//! two loads of different size, divided by the difference of the sizes, so that whatever does not grow with the
//! requests drops out. What the machine does besides moves it by nothing but the few ticks of a slower Envoy.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use trimtab_testbed::Envoy;

use crate::load::Sender;
use crate::report::{median, thousands};
use crate::variants::{self, Variant};

/// V8 compiles the module in a machine that is fifty times slower.
const PATIENCE: Duration = Duration::from_secs(300);
/// Until V8 has optimised what it will, and every table is as large as it gets.
const WARM_UP: u64 = 2000;
const SMALL: u64 = 50;
const LARGE: u64 = 350;
const WINDOWS: usize = 3;
/// Envoys at once.
const JOBS: usize = 2;

/// A variant and its instructions a request, window by window.
pub struct Count {
    pub variant: Variant,
    windows: Vec<f64>,
}

impl Count {
    pub fn median(&self) -> f64 {
        median(&self.windows)
    }

    fn spread(&self) -> f64 {
        let (least, most) =
            self.windows.iter().fold((f64::MAX, 0.0f64), |(least, most), &n| (least.min(n), most.max(n)));
        (most - least) / self.median()
    }
}

pub async fn measure() -> Result<Vec<Count>, String> {
    // Each group is one Envoy: its start is what takes the time. Only what does not disturb the others shares one.
    let groups = vec![
        vec![variants::everything()],
        vec![variants::none(), variants::limit(), variants::canary(), variants::trace(), variants::request_side()],
        vec![variants::empty()],
        variants::boundary(),
        vec![variants::router(), variants::steered(), variants::native(), variants::lua()],
    ];
    let upstream = variants::start_upstream().await?;
    let address = upstream.address("upstream");
    let waiting = Mutex::new(groups);
    let runtime = tokio::runtime::Handle::current();
    let job = || {
        let mut counts = Vec::new();
        loop {
            let group = waiting.lock().map_err(|_| "another job panicked".to_owned())?.pop();
            match group {
                Some(group) => counts.extend(runtime.block_on(count(group, address))?),
                None => return Ok::<_, String>(counts),
            }
        }
    };
    let done: Vec<_> = tokio::task::block_in_place(|| {
        std::thread::scope(|scope| {
            let jobs: Vec<_> = (0..JOBS).map(|_| scope.spawn(job)).collect();
            jobs.into_iter().map(|job| job.join().map_err(|_| "a job panicked".to_owned())?).collect::<Result<_, _>>()
        })
    })?;
    let mut counts: Vec<Count> = done.into_iter().flatten().collect();
    const ORDER: [&str; 15] = [
        "router",
        "steered",
        "native",
        "lua",
        "empty",
        "callbacks",
        "calls-none",
        "calls-limit",
        "calls-request",
        "calls-everything",
        "none",
        "limit",
        "canary",
        "trace",
        "request",
    ];
    counts.sort_by_key(|count| ORDER.iter().position(|id| *id == count.variant.id).unwrap_or(ORDER.len()));
    Ok(counts)
}

async fn count(group: Vec<Variant>, upstream: SocketAddr) -> Result<Vec<Count>, String> {
    let output = tempfile::tempdir().map_err(|error| format!("no temporary directory: {error}"))?;
    let mut file = OsString::from("--callgrind-out-file=");
    file.push(output.path().join("out"));
    let valgrind = ["valgrind", "--tool=callgrind", "--separate-threads=yes"].map(OsString::from);
    let options = variants::options(1).under(valgrind.into_iter().chain([file])).patience(PATIENCE);
    let envoy = variants::start(options, &group, upstream).await?;
    let mut counts = Vec::new();
    for variant in group {
        let windows = tokio::task::block_in_place(|| windows(&envoy, &variant, output.path()))
            .map_err(|error| format!("{}: {error}\n{}", variant.name, envoy.log_tail()))?;
        let count = Count { variant, windows };
        eprintln!(
            "{:>9} instructions, within {:.2} %: {}",
            thousands(count.median()),
            count.spread() * 100.0,
            count.variant.name
        );
        counts.push(count);
    }
    Ok(counts)
}

fn windows(envoy: &Envoy, variant: &Variant, output: &Path) -> Result<Vec<f64>, String> {
    let mut sender = Sender::connect(envoy.address(variant.id))?;
    (0..WARM_UP).try_for_each(|_| sender.send(0))?;
    let mut window = |requests: u64| -> Result<u64, String> {
        control(envoy, "--zero")?;
        (0..requests).try_for_each(|_| sender.send(0))?;
        control(envoy, "--dump")?;
        busiest_thread(output)
    };
    (0..WINDOWS)
        .map(|_| {
            let (small, large) = (window(SMALL)?, window(LARGE)?);
            Ok((large as f64 - small as f64) / (LARGE - SMALL) as f64)
        })
        .collect()
}

fn control(envoy: &Envoy, what: &str) -> Result<(), String> {
    let output = Command::new("callgrind_control").arg(what).arg(envoy.process_group().to_string()).output();
    let output = output.map_err(|error| format!("cannot run callgrind_control: {error}"))?;
    let said = String::from_utf8_lossy(&output.stdout);
    match output.status.success() && !said.contains("Error") {
        true => Ok(()),
        false => Err(format!("callgrind_control {what}: {said}{}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// The instructions of the thread that had most, from the dumps there are, which are removed.
fn busiest_thread(output: &Path) -> Result<u64, String> {
    let io = |error: std::io::Error| format!("cannot read callgrind's dump: {error}");
    let mut most = None;
    for entry in std::fs::read_dir(output).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let dump = String::from_utf8_lossy(&std::fs::read(&path).map_err(io)?).into_owned();
        let total = dump.lines().find_map(|line| line.strip_prefix("totals: ").or(line.strip_prefix("summary: ")));
        most = most.max(total.and_then(|total| total.split_whitespace().next()?.parse().ok()));
        std::fs::remove_file(&path).map_err(io)?;
    }
    most.ok_or_else(|| "callgrind dumped nothing".to_owned())
}

pub fn table(counts: &[Count]) -> String {
    let base = counts.iter().find(|count| count.variant.id == "router").map_or(0.0, Count::median);
    let mut table = String::from("| | instructions a request | added | windows differ by |\n|---|---:|---:|---:|\n");
    for count in counts {
        let added = count.median() - base;
        table += &format!(
            "| {} | {} | {} | {:.2} % |\n",
            count.variant.name,
            thousands(count.median()),
            thousands(added),
            count.spread() * 100.0
        );
    }
    table
}

/// What each variant adds to the router, for the picture.
pub fn added(counts: &[Count]) -> Vec<(&'static str, f64)> {
    let base = counts.iter().find(|count| count.variant.id == "router").map_or(0.0, Count::median);
    let others = counts.iter().filter(|count| count.variant.id != "router");
    others.map(|count| (count.variant.id, count.median() - base)).collect()
}
