//! CPU time with more workers, when all of them ask for one key and when they ask for many, and whether what they share
//! stays exact meanwhile.

use std::net::SocketAddr;
use std::time::Instant;

use crate::load::{count_admitted, load};
use crate::memory::ratio;
use crate::report::median;
use crate::usage::cpu;
use crate::variants::{self, Variant};

const ROUNDS: usize = 15;
const BURST: u64 = 4000;
const CONNECTIONS: u64 = 16;
const MANY: u64 = 10_000;
const WORKERS: [u32; 3] = [1, 2, 4];

/// One variant under one number of workers, with one number of users.
struct Case {
    variant: usize,
    workers: usize,
    users: u64,
    microseconds: Vec<f64>,
}

pub async fn measure() -> Result<String, String> {
    let upstream = variants::start_upstream().await?;
    let upstream = upstream.address("upstream");
    let variants: [Variant; 3] = [variants::router(), variants::limit(), variants::everything()];
    let mut envoys = Vec::new();
    for workers in WORKERS {
        for variant in &variants {
            let envoy = variants::start(variants::options(workers), std::slice::from_ref(variant), upstream).await?;
            let address = envoy.address(variant.id);
            tokio::task::block_in_place(|| load(address, CONNECTIONS, 2 * MANY, MANY))?;
            envoys.push((envoy, address));
        }
    }
    let mut cases = Vec::new();
    for variant in 0..variants.len() {
        for users in [1, MANY] {
            for workers in 0..WORKERS.len() {
                cases.push(Case { variant, workers, users, microseconds: Vec::new() });
            }
        }
    }
    for round in 0..ROUNDS {
        for turn in 0..cases.len() {
            // 7 and the number of cases, 18, have no common divisor: all of them come, and in no plain order.
            let index = (turn * 7 + round) % cases.len();
            let case = &mut cases[index];
            let (envoy, address) = &envoys[case.workers * variants.len() + case.variant];
            let before = cpu(envoy)?;
            tokio::task::block_in_place(|| load(*address, CONNECTIONS, BURST, case.users))?;
            case.microseconds.push((cpu(envoy)? - before).as_secs_f64() * 1e6 / BURST as f64);
        }
    }
    let mut table = format!(
        "CPU time a request, in microseconds, and its ratio to that of the router with as many workers and users: medians \
         of {ROUNDS} alternating rounds of {BURST} requests over {CONNECTIONS} connections. The machine has {} cores, which \
         the workers share with the upstream and the client; more workers than cores say nothing of speed, but show \
         whether they get into each other's way.\n\n\
         | | users | 1 worker | ratio | 2 workers | ratio | 4 workers | ratio |\n\
         |---|---:|---:|---:|---:|---:|---:|---:|\n",
        std::thread::available_parallelism().map_or(0, usize::from),
    );
    // A row has one case for each number of workers; the router's rows come first, one for each number of users.
    let rows: Vec<&[Case]> = cases.chunks(WORKERS.len()).collect();
    for (index, row) in rows.iter().enumerate() {
        let base = rows[index % 2];
        table += &format!("| {} | {} ", variants[row[0].variant].name, row[0].users);
        for (case, base) in row.iter().zip(base) {
            let (values, base) = (&case.microseconds, &base.microseconds);
            table += &format!("| {:.0} | {:.2} ", median(values), ratio(values, base));
        }
        table += "|\n";
    }
    table += &exactness(upstream).await?;
    Ok(table)
}

/// What the workers admitted together, and what they know together of a canary.
async fn exactness(upstream: SocketAddr) -> Result<String, String> {
    const COUNT: u64 = 30_000;
    const USERS: u64 = 1000;
    const HOURLY: u64 = 500;
    const SMALL: u64 = 20;
    let mut rows = [
        format!("| admitted of {COUNT} requests of one user, {HOURLY} an hour; at most "),
        format!("| admitted of {COUNT} requests of {USERS} users, {SMALL} an hour each; at most "),
        format!("| answers that the judge of a canary knows of, of {COUNT} "),
    ];
    for workers in WORKERS {
        let variants = [variants::lasting_limit(), variants::small_limit(), variants::everything()];
        let envoy = variants::start(variants::options(workers), &variants, upstream).await?;
        for ((variant, row), (users, each)) in
            variants.iter().zip(&mut rows).zip([(1, HOURLY), (USERS, SMALL), (USERS, 0)])
        {
            let begin = Instant::now();
            let address = envoy.address(variant.id);
            let admitted = tokio::task::block_in_place(|| count_admitted(address, CONNECTIONS, COUNT, users))?;
            *row += &match each {
                0 => {
                    let stats = envoy.stats(&format!("wasmcustom.trimtab.policy.{}.", variant.id)).await;
                    let known =
                        stats.iter().filter(|(name, _)| name.contains(".judge.") && name.ends_with(".requests"));
                    format!("| {} ", known.map(|(_, count)| count).sum::<u64>())
                }
                each => {
                    let regained = begin.elapsed().as_secs_f64() * each as f64 / 3600.0;
                    format!("| {admitted}; {} ", users * (each + regained as u64))
                }
            };
        }
    }
    let rows = rows.map(|row| row + "|\n").concat();
    Ok(format!(
        "\nThe same connections, and what all workers share. A limit admits at most its burst and what is regained \
         meanwhile.\n\n| | 1 worker | 2 workers | 4 workers |\n|---|---:|---:|---:|\n{rows}"
    ))
}
