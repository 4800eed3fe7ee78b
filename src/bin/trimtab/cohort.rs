//! `trimtab cohort`: the buckets of keys in a rollout, to evaluate it offline.

use clap::Args;
use std::io::{self, BufRead, BufWriter, Write};
use trimtab::canary::cohort;

#[derive(Args)]
pub(crate) struct Cohort {
    /// The rollout, as canary.rollout names it
    #[arg(long, value_parser = rollout)]
    rollout: String,

    /// The keys
    #[arg(value_name = "KEY")]
    keys: Vec<String>,
}

impl Cohort {
    pub(crate) fn run(&self, out: &mut impl Write) -> io::Result<()> {
        let mut out = BufWriter::new(out);
        let mut place = |key: &[u8]| {
            write!(out, "{}\t", cohort(self.rollout.as_bytes(), key))?;
            out.write_all(key)?;
            out.write_all(b"\n")
        };
        if matches!(self.keys.as_slice(), [only] if only == "-") || self.keys.is_empty() {
            for line in io::stdin().lock().split(b'\n') {
                let line = line?;
                place(line.strip_suffix(b"\r").unwrap_or(&line))?;
            }
        } else {
            self.keys.iter().try_for_each(|key| place(key.as_bytes()))?;
        }
        out.flush()
    }
}

/// The same as the policy asks of a rollout.
fn rollout(text: &str) -> Result<String, &'static str> {
    let fits = !text.is_empty() && text.len() <= 128 && !text.contains('\n');
    if fits { Ok(text.to_owned()) } else { Err("write one line of at most 128 bytes") }
}
