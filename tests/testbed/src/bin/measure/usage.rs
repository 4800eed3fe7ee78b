//! What the kernel says of a process.

use std::time::Duration;

use trimtab_testbed::Envoy;

/// The CPU time of all of its threads.
pub fn cpu(envoy: &Envoy) -> Result<Duration, String> {
    let tasks = format!("/proc/{}/task", envoy.process_group());
    let threads = std::fs::read_dir(&tasks).map_err(|error| format!("{tasks}: {error}"))?;
    // A thread may end while its siblings are read.
    let spent = threads.flatten().filter_map(|thread| {
        let spent = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        spent.split_whitespace().next()?.parse::<u64>().ok()
    });
    Ok(Duration::from_nanos(spent.sum()))
}

/// Its resident memory, in MiB.
pub fn resident(envoy: &Envoy) -> Result<f64, String> {
    let status = format!("/proc/{}/status", envoy.process_group());
    let text = std::fs::read_to_string(&status).map_err(|error| format!("{status}: {error}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
    Ok(kib.ok_or_else(|| format!("{status} has no VmRSS"))? / 1024.0)
}
