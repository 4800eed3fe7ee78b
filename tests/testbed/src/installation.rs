//! Where Envoy is, and what starts it.

use std::path::{Path, PathBuf};

use crate::repository;

/// The Envoy that the tests are written for; `envoy/setup.sh` installs it.
pub const ENVOY_VERSION: &str = "1.40.0";

/// What starts Envoy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// `func-e run`, with `ENVOY_PATH` naming the binary.
    FuncE,
    /// The binary itself.
    Direct,
}

/// The programs found on this machine.
#[derive(Debug, Clone)]
pub struct Installation {
    /// The Envoy binary.
    pub envoy: PathBuf,
    /// func-e, where a Go toolchain was there to build it.
    pub func_e: Option<PathBuf>,
}

impl Installation {
    /// Looks for `$ENVOY`, then for what `envoy/setup.sh` put into `.cache`.
    ///
    /// # Errors
    /// A sentence that says what is missing and what to do.
    pub fn find() -> Result<Self, String> {
        let cache = repository().join(".cache");
        let envoy = match std::env::var_os("ENVOY").filter(|path| !path.is_empty()) {
            Some(path) => {
                executable(Path::new(&path)).ok_or_else(|| format!("ENVOY={} is no executable file", path.display()))?
            }
            None => executable(&cache.join("envoy").join(ENVOY_VERSION).join("envoy"))
                .ok_or("no Envoy: run envoy/setup.sh, or set ENVOY")?,
        };
        let func_e = executable(&cache.join("bin/func-e"));
        Ok(Self { envoy, func_e })
    }

    /// func-e where it is there, the binary itself otherwise.
    pub fn launcher(&self) -> Launcher {
        match self.func_e {
            Some(_) => Launcher::FuncE,
            None => Launcher::Direct,
        }
    }
}

pub(crate) fn executable(path: &Path) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = path.canonicalize().ok()?;
    let metadata = path.metadata().ok()?;
    (metadata.is_file() && metadata.permissions().mode() & 0o111 != 0).then_some(path)
}
