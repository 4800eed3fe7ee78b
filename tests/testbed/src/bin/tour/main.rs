//! A tour of Trimtab on real traffic: an Envoy with the module and the policy
//! of `envoy/policy.yaml` between a client and two versions of a service.
//!
//! All that it tells it has seen; where that is not what the policy promises
//! it says what it expected and fails. After the tour everything stays up for
//! whoever wants to try more, until Ctrl-C, or ends at once with `--once`.

mod ask;
mod outcome;
mod stage;
mod steps;
mod terminal;

use std::process::ExitCode;

use tokio::signal::unix::{Signal, SignalKind, signal};

use outcome::Failure;
use stage::Stage;
use terminal::Terminal;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let once = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => false,
        ["--once"] => true,
        _ => {
            eprintln!("usage: tour [--once]");
            return ExitCode::from(2);
        }
    };
    let mut signals = match Signals::catch() {
        Ok(signals) => signals,
        Err(error) => return report(&Failure::Broken(format!("cannot wait for Ctrl-C: {error}"))),
    };
    // Whichever way this ends, what was started is dropped, and so ended.
    let toured = tokio::select! {
        code = signals.next() => return code,
        toured = tour(once) => toured,
    };
    match toured {
        Ok(_) if once => ExitCode::SUCCESS,
        Ok(_stage) => {
            signals.next().await;
            println!();
            ExitCode::SUCCESS
        }
        Err(failure) => report(&failure),
    }
}

async fn tour(once: bool) -> Result<Stage, Failure> {
    let mut stage = Stage::set(Terminal::new()).await?;
    let toured = match steps::all(&mut stage).await {
        Ok(()) => stage.farewell(once),
        Err(failure) => Err(failure),
    };
    toured.map_err(|failure| failure.with_log(&stage.envoy.log_tail()))?;
    Ok(stage)
}

fn report(failure: &Failure) -> ExitCode {
    eprintln!("\ntour: {failure}");
    ExitCode::FAILURE
}

/// What asks a program to end.
struct Signals([(u8, Signal); 3]);

impl Signals {
    fn catch() -> std::io::Result<Self> {
        let catch = |number, kind| signal(kind).map(|signal| (number, signal));
        Ok(Self([
            catch(1, SignalKind::hangup())?,
            catch(2, SignalKind::interrupt())?,
            catch(15, SignalKind::terminate())?,
        ]))
    }

    /// Waits for one, and gives the exit code by which shells know it.
    async fn next(&mut self) -> ExitCode {
        let [(hangup, on_hangup), (interrupt, on_interrupt), (terminate, on_terminate)] = &mut self.0;
        let number = tokio::select! {
            _ = on_hangup.recv() => hangup,
            _ = on_interrupt.recv() => interrupt,
            _ = on_terminate.recv() => terminate,
        };
        ExitCode::from(128 + *number)
    }
}
