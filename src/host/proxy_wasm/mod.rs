//! Envoy as a host, through the proxy-wasm ABI 0.2.1.
//!
//! The SDK dispatches the callbacks to the contexts here, which drive a [`Worker`]. `abi` has the calls to Envoy, `envoy`
//! implements [`crate::host::Host`] with them. The request's headers are fetched as the one block that Envoy serialises.

mod abi;
mod envoy;

use super::{CallId, GrpcAnswer, Host};
use crate::http::{HeaderMutation, LocalReply, encode_headers};
use crate::outlier::MAX_ANSWER_BYTES;
use crate::policy::Policy;
use crate::ratelimit::service::MAX_RESPONSE_BYTES;
use crate::units::MonotonicInstant;
use crate::worker::{self, Worker};
use envoy::Envoy;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, BufferType, ContextType, LogLevel, MapType};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

#[allow(unsafe_code)] // The macro exports `_initialize`.
mod start {
    use super::{LogLevel, Root};

    proxy_wasm::main! {{
        proxy_wasm::set_log_level(LogLevel::Info);
        proxy_wasm::set_root_context(|_| Box::new(Root::default()));
    }}
}

/// One configuration in one worker thread.
///
/// Invariant: no borrow is alive while a stream is released, because the host may then call back at once.
#[derive(Default)]
struct Plugin {
    envoy: Envoy,
    /// `None` until a policy is accepted.
    worker: RefCell<Option<Worker>>,
    /// For when the next tick was asked for.
    armed: Cell<Option<MonotonicInstant>>,
    /// Whether that tick comes soon enough to publish what was counted.
    is_publication_armed: Cell<bool>,
}

/// Envoy's streams, as a worker releases them. Envoy carries out what is asked for after the callback.
struct EnvoyStreams;

impl worker::Streams for EnvoyStreams {
    fn select(&mut self, stream: u32) -> bool {
        abi::select_stream(stream)
    }

    fn connection(&mut self) -> Option<u64> {
        let id = abi::property("connection\0id")?;
        Some(u64::from_le_bytes(id.try_into().ok()?))
    }

    fn mutate(&mut self, mutation: &HeaderMutation<'_>) {
        mutate(MapType::HttpRequestHeaders, mutation);
    }

    fn release(&mut self, _: u32, action: worker::Action) {
        match action {
            worker::Action::Continue => abi::continue_request(),
            worker::Action::Reply(reply) => answer(&reply),
            worker::Action::Reset => abi::reset_stream(),
            worker::Action::Pause => {}
        }
    }
}

thread_local! {
    /// The plugins that may have gRPC calls under way, one for each configuration that is in use: the host names a call
    /// that is answered by its token alone.
    static PLUGINS: RefCell<Vec<Weak<Plugin>>> = const { RefCell::new(Vec::new()) };
}

/// Takes the answer to a call, for whichever plugin sent it.
fn on_grpc_answer(answer: GrpcAnswer<'_>) {
    let plugins: Vec<Rc<Plugin>> = PLUGINS.with_borrow(|plugins| plugins.iter().filter_map(Weak::upgrade).collect());
    for plugin in plugins {
        plugin.with_worker(|worker, envoy| worker.on_grpc_answer(envoy, answer, &mut EnvoyStreams));
        plugin.arm();
    }
}

/// The message that answers a call. Not the SDK's callback: that one hands an answer to the stream that sent the call,
/// which may be gone while others wait for it. `pack` gives this one its name in the ABI.
#[allow(unsafe_code)] // A symbol that another library could define too.
#[unsafe(no_mangle)]
extern "C" fn trimtab_on_grpc_receive(_root: u32, token: u32, size: usize) {
    // What is longer is cut, and what was cut cannot be read.
    let size = size.min(MAX_RESPONSE_BYTES);
    let message = abi::buffer(BufferType::GrpcReceiveBuffer, size);
    on_grpc_answer(GrpcAnswer { call: CallId(token), status: 0, message: &message.unwrap_or_default() });
}

/// The end of a call that was not answered, with its gRPC status, which is not 0.
#[allow(unsafe_code)] // A symbol that another library could define too.
#[unsafe(no_mangle)]
extern "C" fn trimtab_on_grpc_close(_root: u32, token: u32, status: u32) {
    let text = abi::grpc_status_text();
    on_grpc_answer(GrpcAnswer { call: CallId(token), status, message: &text.unwrap_or_default() });
}

impl Plugin {
    /// Calls `action` with the worker, where there is one.
    fn with_worker<R>(&self, action: impl FnOnce(&mut Worker, &Envoy) -> R) -> Option<R> {
        self.worker.borrow_mut().as_mut().map(|worker| action(worker, &self.envoy))
    }

    /// Asks for the next tick, if something was counted since the last one.
    fn arm_publication(&self) {
        if !self.is_publication_armed.get() && self.envoy.has_unpublished() {
            self.is_publication_armed.set(true);
            self.arm();
        }
    }

    /// Asks for the next tick, if it is to come earlier than the one that was asked for.
    fn arm(&self) {
        const MILLISECOND: u64 = 1_000_000;
        let Some(Some(due)) = self.with_worker(|worker, envoy| worker.next_tick(envoy)) else { return };
        if self.armed.get().is_none_or(|armed| due < armed) {
            self.armed.set(Some(due));
            let period = due.saturating_since(self.envoy.now()).div_ceil(MILLISECOND).max(1);
            abi::set_tick_period(u32::try_from(period).unwrap_or(u32::MAX));
        }
    }
}

/// The root context: one for each configuration and worker thread.
#[derive(Default)]
struct Root {
    plugin: Rc<Plugin>,
}

impl Context for Root {
    fn on_http_call_response(&mut self, call: u32, _: usize, size: usize, _: usize) {
        let body = || abi::buffer(BufferType::HttpCallResponseBody, size);
        let status = abi::header(MapType::HttpCallResponseHeaders, ":status");
        let body = if size <= MAX_ANSWER_BYTES { Some(body().unwrap_or_default()) } else { None };
        self.plugin.with_worker(|worker, envoy| worker.on_http_answer(envoy, call, status, body.as_deref()));
    }
}

/// Envoy deletes the root context (`proxy_on_delete`) when the configuration has been replaced or removed and its last
/// stream in this worker thread has ended.
impl Drop for Root {
    fn drop(&mut self) {
        self.plugin.with_worker(|worker, envoy| {
            worker.on_shutdown(envoy);
            log::info!("policy {} is unloaded", worker.policy().name);
        });
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, size: usize) -> bool {
        // Messages below Envoy's level are not formatted.
        proxy_wasm::set_log_level(abi::log_level());
        let text = abi::buffer(BufferType::PluginConfiguration, size);
        match Policy::from_json(&text.unwrap_or_default(), &abi::environment) {
            Ok((policy, warnings)) => {
                for warning in warnings {
                    log::warn!("policy {}: {warning}", policy.name);
                }
                log::info!("policy {} is loaded: {} routes", policy.name, policy.routes.len());
                // Every worker leaves the secret of the limit keys, so the first one after a start finds none.
                if abi::shared_data(&[&*policy.state_prefix, "secret"].concat()).is_none() {
                    log::info!(
                        "policy {}: shared data are empty: limits, verdicts and experiments begin anew",
                        policy.name
                    );
                }
                if policy.has_services() {
                    PLUGINS.with_borrow_mut(|plugins| {
                        plugins.retain(|plugin| plugin.strong_count() > 0);
                        plugins.push(Rc::downgrade(&self.plugin));
                    });
                }
                *self.plugin.worker.borrow_mut() = Some(Worker::new(policy, &self.plugin.envoy));
                self.plugin.arm();
                true
            }
            Err(diagnostics) => {
                for diagnostic in diagnostics {
                    log::error!("policy refused: {diagnostic}");
                }
                false
            }
        }
    }

    fn on_tick(&mut self) {
        // The host repeats the tick with the period that was set last.
        self.plugin.armed.set(None);
        self.plugin.is_publication_armed.set(false);
        self.plugin.with_worker(|worker, envoy| worker.on_tick(envoy, &mut EnvoyStreams));
        self.plugin.arm();
        if self.plugin.armed.get().is_none() {
            abi::set_tick_period(0);
        }
    }

    fn create_http_context(&self, id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { plugin: Rc::clone(&self.plugin), stream: worker::Stream::new(id) }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// The context of one stream.
struct Stream {
    plugin: Rc<Plugin>,
    stream: worker::Stream,
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        let headers = abi::header_block(MapType::HttpRequestHeaders);
        let (plugin, stream) = (&*self.plugin, &mut self.stream);
        let mutate = |mutation: &HeaderMutation<'_>| mutate(MapType::HttpRequestHeaders, mutation);
        let action = plugin.with_worker(|worker, envoy| {
            worker.on_request(envoy, stream, headers.unwrap_or_default(), !end_of_stream, mutate, |_| {})
        });
        if action == Some(worker::Action::Pause) {
            plugin.arm();
        }
        plugin.arm_publication();
        match action {
            None | Some(worker::Action::Continue) => return Action::Continue,
            Some(worker::Action::Pause) => {}
            Some(worker::Action::Reply(reply)) => answer(&reply),
            Some(worker::Action::Reset) => abi::reset_stream(),
        }
        Action::Pause
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        let stream = &mut self.stream;
        let header = |name: &str| abi::header(MapType::HttpResponseHeaders, name);
        let mut change = |mutation| mutate(MapType::HttpResponseHeaders, &mutation);
        self.plugin.with_worker(|worker, envoy| worker.on_response(envoy, stream, &header, &mut change));
        self.plugin.arm_publication();
        Action::Continue
    }

    fn on_http_response_trailers(&mut self, _: usize) -> Action {
        let stream = &mut self.stream;
        let header = |name: &str| abi::header(MapType::HttpResponseTrailers, name);
        let mut change = |mutation| mutate(MapType::HttpResponseTrailers, &mutation);
        self.plugin.with_worker(|worker, envoy| worker.on_response_trailers(envoy, stream, &header, &mut change));
        self.plugin.arm_publication();
        Action::Continue
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let stream = &mut self.stream;
        self.plugin.with_worker(|worker, envoy| worker.on_end(envoy, stream));
        self.plugin.arm_publication();
    }
}

fn mutate(map: MapType, mutation: &HeaderMutation<'_>) {
    match mutation {
        HeaderMutation::Add(name, value) => abi::add_header(map, name, value),
        HeaderMutation::Set(name, value) => abi::replace_header(map, name, value),
        HeaderMutation::Remove(name) => abi::remove_header(map, name),
    }
}

#[inline(never)]
fn answer(reply: &LocalReply) {
    let headers: Vec<(&str, &str)> = reply.headers.iter().map(|(name, value)| (&**name, &**value)).collect();
    let grpc_status = reply.grpc_status.map_or(-1, i32::from);
    let (status, body) = (u32::from(reply.status), reply.body.as_bytes());
    abi::send_local_response(status, reply.details, body, &encode_headers(&headers), grpc_status);
}
