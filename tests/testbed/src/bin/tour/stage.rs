//! What the tour is played on: Envoy, the service's two versions, the policy.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::Value;
use trimtab_testbed::{
    Behaviour, Bootstrap, Client, Direction, ENVOY_VERSION, Envoy, Launcher, Listener, Response, Update, Upstream,
    cluster, find_wasm, json_from_yaml, repository,
};

use crate::ask::Ask;
use crate::outcome::{Failure, Outcome};
use crate::terminal::Terminal;

const LISTENER: &str = "inbound";
const POLICY: &str = "envoy/policy.yaml";

pub(crate) struct Stage {
    // First, because it is the first to go.
    pub(crate) envoy: Envoy,
    pub(crate) v1: Upstream,
    pub(crate) v2: Upstream,
    /// The policy, as it is written.
    pub(crate) policy: Value,
    pub(crate) terminal: Terminal,
    started: Instant,
}

impl Stage {
    /// Starts everything, and says what and where.
    pub(crate) async fn set(terminal: Terminal) -> Outcome<Self> {
        let started = Instant::now();
        find_wasm()?;
        let text = std::fs::read_to_string(repository().join(POLICY));
        let text = text.map_err(|error| format!("{POLICY}: {error}"))?;
        let policy = json_from_yaml(&text).map_err(|error| format!("{POLICY}: {error}"))?;

        let v1 = Upstream::start("v1").await;
        let v2 = Upstream::start("v2").await;
        let bootstrap = Bootstrap::new()
            .dynamic()
            .listener(listener(&policy))
            .cluster(cluster("v1", v1.address()))
            .cluster(cluster("v2", v2.address()));
        let envoy = Envoy::options().try_start(&bootstrap).await?;

        let launcher = match envoy.launcher() {
            Launcher::FuncE => "by func-e",
            Launcher::Direct => "directly (func-e is not installed)",
        };
        terminal.title("Trimtab, on real traffic")?;
        terminal.saw(&format!("Envoy {ENVOY_VERSION}, started {launcher}, on http://{}", envoy.address(LISTENER)))?;
        terminal.saw(&format!("two versions of a service: v1 on {}, v2 on {}", v1.address(), v2.address()))?;
        terminal.saw(&format!("the policy {POLICY}"))?;
        Ok(Self { envoy, v1, v2, policy, terminal, started })
    }

    /// Where the service is asked.
    pub(crate) fn address(&self) -> SocketAddr {
        self.envoy.address(LISTENER)
    }

    /// A client that, like a shell's, opens a connection for each request.
    pub(crate) fn client(&self) -> Client {
        Client::http1(self.address()).without_reuse()
    }

    /// Asks without saying so.
    pub(crate) async fn send(&self, ask: &Ask) -> Outcome<Response> {
        let client = if ask.grpc { Client::http2(self.address()) } else { self.client() };
        Ok(client.try_send(ask.request(self.address())).await?)
    }

    /// Says what is asked, asks, and says what came back, with the headers
    /// that matter.
    pub(crate) async fn ask(&self, ask: &Ask, headers: &[&str]) -> Outcome<Response> {
        self.terminal.command(&ask.curl(self.address()))?;
        let answer = self.send(ask).await?;
        self.terminal.saw(&summary(&answer, headers))?;
        Ok(answer)
    }

    /// How many requests have reached either version.
    pub(crate) fn arrived(&self) -> usize {
        self.v1.count() + self.v2.count()
    }

    /// One of the policy's metrics; one that was never counted is 0.
    pub(crate) async fn metric(&self, name: &str) -> u64 {
        let service = self.policy["name"].as_str().unwrap_or_default();
        self.envoy.stat(&format!("wasmcustom.trimtab.policy.{service}.{name}")).await.unwrap_or(0)
    }

    /// Makes another policy the one in force.
    pub(crate) async fn push(&mut self, policy: &Value) -> Outcome {
        match self.offer(policy).await {
            Update::Accepted => Ok(()),
            Update::Rejected(log) => Err(Failure::Broken(format!("Envoy refused the policy:\n{log}"))),
        }
    }

    /// Offers another policy, which may be refused.
    pub(crate) async fn offer(&mut self, policy: &Value) -> Update {
        self.envoy.update(&[listener(policy)]).await
    }

    /// Says what there is to try, or that this is the end.
    pub(crate) fn farewell(&self, once: bool) -> Outcome {
        for upstream in [&self.v1, &self.v2] {
            upstream.set_behaviour(Behaviour::echo());
            upstream.clear();
        }
        let Self { terminal, envoy, .. } = self;
        let elapsed = self.started.elapsed().as_secs_f64();
        terminal.title(&format!("All of it held. That took {elapsed:.0} s."))?;
        if once {
            return Ok(());
        }
        terminal.saw("Everything stays up. Ctrl-C ends it.")?;
        let admin = envoy.admin_address();
        terminal.saw(&format!("the service   http://{}", self.address()))?;
        terminal.saw(&format!("the metrics   http://{admin}/stats?filter=wasmcustom"))?;
        terminal.saw(&format!("Envoy's admin http://{admin}"))?;
        terminal.saw(&format!("Envoy's log   {}", envoy.log_path().display()))?;
        terminal.title("To try")?;
        for ask in [
            Ask::get().user("ann"),
            Ask::get().header("x-canary", "true"),
            Ask::get().header("x-experiment", "slow"),
            Ask::get().header("x-experiment", "guarded"),
        ] {
            terminal.command(&ask.curl(self.address()))?;
        }
        let flood = format!("'http://{}/users/7?n=[1-105]'", self.address());
        let words =
            ["curl -sZ", &flood, "-H 'x-user-id: bob'", "-o /dev/null", "-w '%{http_code}\\n' |", "sort |", "uniq -c"];
        terminal.command(&words.map(str::to_owned))?;
        terminal.command(&["curl -s".to_owned(), format!("'http://{admin}/stats?filter=wasmcustom'")])?;
        Ok(())
    }
}

fn listener(policy: &Value) -> Listener {
    Listener::new(LISTENER).direction(Direction::Inbound).policy(&policy.to_string())
}

/// `200 from v2 in 1.3 ms`, and headers.
pub(crate) fn summary(answer: &Response, headers: &[&str]) -> String {
    let from = match answer.version() {
        "" => String::new(),
        version => format!(" from {version}"),
    };
    let mut text = format!("{}{from} in {}", answer.status.as_u16(), milliseconds(answer.elapsed));
    for name in headers {
        let value = answer.header(name).or_else(|| answer.trailer(name));
        text += &format!(", {name}: {}", value.unwrap_or("(none)"));
    }
    text
}

pub(crate) fn milliseconds(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1e3)
}
