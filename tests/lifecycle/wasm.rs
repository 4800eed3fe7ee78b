//! The module that ships, in a virtual machine for each worker.

use crate::proxy::{Call, ENVIRONMENT, GrpcCall, Headers, Outcome, Proxy, Reply, StreamId, has_body};
use std::sync::LazyLock;
use std::time::Duration;
use trimtab_vm::{Action, Options, Refused, RootId, Vm, World, advance};

static MODULE: LazyLock<trimtab_vm::Module> = LazyLock::new(|| {
    let path = std::env::var("TRIMTAB_WASM")
        .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/target/wasm/trimtab.wasm").to_owned());
    trimtab_vm::Module::from_file(&path).unwrap_or_else(|error| panic!("{path}: {error:#}; run `make build`"))
});

pub struct Module {
    world: World,
    workers: Vec<Worker>,
}

struct Worker {
    vm: Vm,
    root: RootId,
    streams: Vec<trimtab_vm::StreamId>,
}

impl Module {
    pub fn start(policy: &str) -> Box<dyn Proxy> {
        let world = World::new(1);
        let workers = (0..2).map(|_| {
            let (name, value) = ENVIRONMENT;
            let options = Options { environment: vec![(name.into(), value.into())], ..Options::default() };
            let mut vm = Vm::with_options(&world, &MODULE, options).expect("the module starts");
            let root = vm.start_plugin("trimtab", policy).expect("the case's policy is valid");
            Worker { vm, root, streams: Vec::new() }
        });
        let workers = workers.collect();
        Box::new(Module { world, workers })
    }

    fn stream(&mut self, stream: StreamId) -> (&mut Vm, trimtab_vm::StreamId) {
        let worker = &mut self.workers[stream.worker];
        (&mut worker.vm, worker.streams[stream.id as usize])
    }
}

impl Proxy for Module {
    fn update(&mut self, policy: &str) -> Result<(), String> {
        for worker in &mut self.workers {
            match worker.vm.start_plugin("trimtab", policy) {
                Ok(root) => {
                    worker.vm.stop_plugin(worker.root).expect("the old configuration ends");
                    worker.root = root;
                }
                Err(Refused::Answered { log, .. }) => {
                    return Err(log.iter().map(|line| format!("{}\n", line.message)).collect());
                }
                Err(Refused::Trapped(trap)) => panic!("{trap}"),
            }
        }
        Ok(())
    }

    fn request(&mut self, worker: usize, headers: &[(&str, &[u8])]) -> (StreamId, Outcome) {
        let at = worker;
        let worker = &mut self.workers[worker];
        let stream = worker.vm.open_stream(worker.root);
        worker.streams.push(stream);
        let action =
            worker.vm.request_headers(stream, headers, !has_body(headers)).unwrap_or_else(|trap| panic!("{trap}"));
        let stream = StreamId { worker: at, id: worker.streams.len() as u32 - 1 };
        let outcome = self.outcome(stream);
        assert_eq!(action == Action::Continue, matches!(outcome, Outcome::Continued(_)), "{outcome:?}");
        (stream, outcome)
    }

    fn response(&mut self, stream: StreamId, headers: &[(&str, &str)]) -> Headers {
        let (vm, stream) = self.stream(stream);
        vm.response_headers(stream, headers, false).unwrap_or_else(|trap| panic!("{trap}"));
        pairs(vm.stream(stream).response_headers())
    }

    fn response_trailers(&mut self, stream: StreamId, trailers: &[(&str, &str)]) -> Headers {
        let (vm, stream) = self.stream(stream);
        vm.response_trailers(stream, trailers).unwrap_or_else(|trap| panic!("{trap}"));
        pairs(vm.stream(stream).response_trailers())
    }

    fn end(&mut self, stream: StreamId) {
        let (vm, stream) = self.stream(stream);
        vm.close(stream).unwrap_or_else(|trap| panic!("{trap}"));
    }

    fn advance(&mut self, time: Duration) {
        let vms = self.workers.iter_mut().map(|worker| &mut worker.vm);
        advance(vms, time).unwrap_or_else(|trap| panic!("{trap}"));
    }

    fn step_wall_clock(&mut self, seconds: i64) {
        let wall = self.world.wall_clock().as_secs().checked_add_signed(seconds).expect("after 1970");
        self.world.set_wall_clock(Duration::from_secs(wall));
    }

    fn outcome(&mut self, stream: StreamId) -> Outcome {
        let (vm, stream) = self.stream(stream);
        let stream = vm.stream(stream);
        match (stream.reply(), stream.request_action()) {
            _ if stream.is_reset() => Outcome::Reset,
            (Some(reply), _) => Outcome::Answered(Reply {
                status: reply.status,
                details: reply.details.clone(),
                headers: pairs(&reply.headers),
                body: String::from_utf8(reply.body.clone()).expect("the body is text"),
                grpc_status: reply.grpc_status,
            }),
            (None, Action::Continue) => Outcome::Continued(pairs(stream.request_headers())),
            (None, Action::Pause) => Outcome::Held,
        }
    }

    fn grpc_calls(&mut self, worker: usize) -> Vec<GrpcCall> {
        let calls = self.workers[worker].vm.grpc_calls();
        calls
            .map(|call| GrpcCall {
                id: call.token,
                cluster: call.cluster.clone(),
                path: format!("/{}/{}", call.service, call.method),
                message: call.message.clone(),
                timeout: call.timeout,
            })
            .collect()
    }

    fn answer_grpc_call(&mut self, worker: usize, call: u32, status: u32, message: &[u8]) {
        self.workers[worker].vm.answer_grpc_call(call, status, message).unwrap_or_else(|trap| panic!("{trap}"));
    }

    fn set_property(&mut self, path: &str, value: &[u8]) {
        self.world.set_property(path, value);
    }

    fn left(&mut self, stream: StreamId, name: &str) -> Option<Vec<u8>> {
        let (vm, stream) = self.stream(stream);
        let written = vm.stream(stream).written_properties();
        written.iter().rev().find(|(known, _)| known == name).map(|(_, value)| value.clone())
    }

    fn add_cluster(&mut self, name: &str) {
        self.world.add_cluster(name);
    }

    fn calls(&mut self) -> Vec<Call> {
        let calls = self.workers.iter().enumerate().flat_map(|(at, worker)| {
            worker.vm.http_calls().map(move |call| Call {
                worker: at,
                number: call.token,
                cluster: call.cluster.clone(),
                path: String::from_utf8(call.headers.get(":path").unwrap().to_vec()).unwrap(),
            })
        });
        calls.collect()
    }

    fn answer_call(&mut self, call: &Call, answer: Option<(&str, &[u8])>) {
        let vm = &mut self.workers[call.worker].vm;
        let answered = match answer {
            Some((status, body)) => vm.answer_http_call(call.number, &[(":status", status)], body),
            None => vm.fail_http_call(call.number),
        };
        answered.unwrap_or_else(|trap| panic!("{trap}"));
    }

    fn write_shared(&mut self, key: &str, value: &[u8]) {
        self.world.set_shared_data(key, value, 0).expect("version 0 writes always");
    }

    /// Metrics are published by ticks.
    fn metric(&mut self, name: &str) -> u64 {
        for worker in &mut self.workers {
            worker.vm.tick_all().unwrap_or_else(|trap| panic!("{trap}"));
        }
        self.world.metric(name)
    }
}

fn pairs(headers: &trimtab_vm::Headers) -> Headers {
    headers.iter().map(|(name, value)| (name.to_owned(), value.to_vec())).collect()
}
