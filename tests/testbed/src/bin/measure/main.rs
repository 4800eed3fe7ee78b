//! What a request costs in a real Envoy, beside a router alone, Envoy's own filters, a Lua script and an empty filter.
//!
//! `measure [instructions] [memory] [times] [workers]` measures these parts, by default all, and writes each into its
//! section of `benches/RESULTS.md`; the instructions are drawn as `benches/cost.svg`, too. A part whose tool is not
//! installed is skipped, and said to be.

mod chart;
mod instructions;
mod load;
mod memory;
mod report;
mod times;
mod usage;
mod variants;
mod workers;

use std::path::Path;
use std::process::ExitCode;

const PARTS: [&str; 4] = ["instructions", "memory", "times", "workers"];

#[tokio::main]
async fn main() -> ExitCode {
    let mut parts: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = parts.iter().find(|part| !PARTS.contains(&part.as_str())) {
        eprintln!("measure: there is no part {unknown:?}; usage: measure [{}]...", PARTS.join("|"));
        return ExitCode::from(2);
    }
    if parts.is_empty() {
        parts = PARTS.map(str::to_owned).to_vec();
    }
    for part in parts {
        if let Err(error) = measure(&part).await {
            eprintln!("measure: {part}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

async fn measure(part: &str) -> Result<(), String> {
    match part {
        "instructions" if !is_installed("callgrind_control") => skip(part, "valgrind"),
        "instructions" => {
            let counts = instructions::measure().await?;
            chart::draw(&instructions::added(&counts))?;
            report::write(part, "Instructions", &format!("{INSTRUCTIONS}\n{}", instructions::table(&counts)))?;
        }
        "memory" => report::write(part, "Start and memory", &memory::measure().await?)?,
        "times" if !is_installed("h2load") => skip(part, "h2load"),
        "times" => report::write(part, "Time", &times::measure().await?)?,
        "workers" => report::write(part, "Workers", &workers::measure().await?)?,
        _ => return Err("no such part".to_owned()),
    }
    Ok(())
}

fn skip(part: &str, tool: &str) {
    println!("measure: {part}: skipped, there is no {tool}; envoy/setup.sh meters installs it where it can");
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| Path::new(&folder).join(program).is_file())
}

const INSTRUCTIONS: &str =
    "Of Envoy's one worker for one request (HTTP/1, 15 headers, answered by an upstream in another process), under
`valgrind --tool=callgrind`; added to the router alone. Lua and the WebAssembly filters have the routes that match the
steering header. \"The calls of\" a policy: a filter that makes the same calls to Envoy and does nothing else.
";
