//! A port of its own that leads to wherever it is told, later or elsewhere.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

/// Passes connections on: what a cluster needs whose endpoint, such as Envoy's
/// own admin interface, has no address before Envoy has started. It ends when
/// dropped.
#[derive(Debug)]
pub struct Relay {
    address: SocketAddr,
    target: Arc<Mutex<Option<SocketAddr>>>,
    accepting: AbortHandle,
}

impl Relay {
    /// Starts a relay that closes connections until it is told where they lead.
    ///
    /// # Panics
    /// When the machine has no port left.
    pub async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback has a free port");
        let address = listener.local_addr().expect("a bound socket has a name");
        let target = Arc::new(Mutex::new(None));
        let accepting = tokio::spawn(accept(listener, target.clone())).abort_handle();
        Self { address, target, accepting }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where connections lead from now on.
    pub fn lead_to(&self, target: SocketAddr) {
        *self.target.lock().unwrap() = Some(target);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Passes connections on. They live in a set of this task's: they end with it.
async fn accept(listener: TcpListener, target: Arc<Mutex<Option<SocketAddr>>>) {
    let mut connections = tokio::task::JoinSet::new();
    loop {
        if let Ok((mut client, _)) = listener.accept().await
            && let Some(target) = *target.lock().unwrap()
        {
            connections.spawn(async move {
                if let Ok(mut server) = TcpStream::connect(target).await {
                    let _ = copy_bidirectional(&mut client, &mut server).await;
                }
            });
        }
        while connections.try_join_next().is_some() {}
    }
}
