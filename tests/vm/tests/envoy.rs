//! The host's own tests: what a guest sees must be what it sees in Envoy.
//! The guests are written by hand and log what their host calls answer.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use trimtab_vm::{Action, Headers, Level, Module, Refused, Vm, World, advance};

/// A module with the callbacks given. `$say` logs a number as one character,
/// so that what a test sees of a run is a short text.
fn module(callbacks: &str) -> Module {
    let text = format!(
        r#"(module
            (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
            (import "env" "proxy_set_tick_period_milliseconds" (func $set_tick_period (param i32) (result i32)))
            (import "env" "proxy_set_effective_context" (func $set_effective_context (param i32) (result i32)))
            (import "env" "proxy_continue_stream" (func $continue (param i32) (result i32)))
            (import "env" "proxy_get_shared_data" (func $get (param i32 i32 i32 i32 i32) (result i32)))
            (import "env" "proxy_set_shared_data" (func $set (param i32 i32 i32 i32 i32) (result i32)))
            (import "env" "proxy_get_header_map_value" (func $header (param i32 i32 i32 i32 i32) (result i32)))
            (import "env" "proxy_get_header_map_pairs" (func $headers (param i32 i32 i32) (result i32)))
            (import "env" "proxy_replace_header_map_value" (func $replace (param i32 i32 i32 i32 i32) (result i32)))
            (import "env" "proxy_send_local_response"
                (func $reply (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
            (import "env" "proxy_done" (func $done (result i32)))
            (import "env" "proxy_brand_new" (func $brand_new))
            (memory (export "memory") 1)
            (data (i32.const 100) "key")
            (data (i32.const 110) "absent")
            (data (i32.const 120) ":path")
            (data (i32.const 130) "x-seen")
            (data (i32.const 140) "out of stock")
            (global $free (mut i32) (i32.const 1024))
            (func (export "proxy_abi_version_0_2_1"))
            (func (export "proxy_on_memory_allocate") (param i32) (result i32)
                (global.get $free)
                (global.set $free (i32.add (global.get $free) (local.get 0))))
            (func $say (param i32)
                (i32.store8 (i32.const 0) (i32.add (local.get 0) (i32.const 48)))
                (drop (call $log (i32.const 2) (i32.const 0) (i32.const 1))))
            (func $path (param i32) (result i32)
                (call $header (local.get 0) (i32.const 120) (i32.const 5) (i32.const 4) (i32.const 8)))
            (func $mark (param i32) (result i32)
                (call $replace (local.get 0) (i32.const 130) (i32.const 6) (i32.const 100) (i32.const 3)))
            {callbacks})"#
    );
    Module::new(text.as_bytes()).unwrap_or_else(|error| panic!("{error:?}"))
}

fn start(callbacks: &str) -> Vm {
    Vm::new(&World::new(0), &module(callbacks)).expect("the VM starts")
}

/// What the guest said since this was last asked.
fn said(vm: &mut Vm) -> String {
    vm.take_log().into_iter().map(|line| line.message).collect()
}

const REQUEST: &[(&str, &str)] = &[(":method", "GET"), (":path", "/")];

#[test]
fn shared_data_obeys_the_rules_of_cas() {
    let mut vm = start(
        r#"(func $write (param i32)
            (call $say (call $set (i32.const 100) (i32.const 3) (i32.const 100) (i32.const 1) (local.get 0))))
        (func (export "proxy_on_configure") (param i32 i32) (result i32)
            (call $say (call $get (i32.const 110) (i32.const 6) (i32.const 4) (i32.const 8) (i32.const 12)))
            (call $write (i32.const -1))  ;; absent: any CAS will do
            (call $write (i32.const -1))  ;; present: no longer
            (call $write (i32.const 0))
            (call $say (call $get (i32.const 100) (i32.const 3) (i32.const 4) (i32.const 8) (i32.const 12)))
            (call $say (i32.load (i32.const 12)))
            (call $write (i32.load (i32.const 12)))
            (call $write (i32.load (i32.const 12)))
            (call $say (call $set (i32.const 110) (i32.const 6) (i32.const 0) (i32.const 0) (i32.const 0)))
            (i32.const 1))"#,
    );
    vm.start_plugin("p", "").expect("it starts");
    assert_eq!(said(&mut vm), "1 0 8 0 0 2 0 8 0".replace(' ', ""));
    assert_eq!(vm.world().shared_data("key"), Some((b"k".to_vec(), 3)));
    assert_eq!(vm.world().shared_data("absent"), Some((Vec::new(), 4)));
    assert_eq!(vm.costs().host_calls["proxy_set_shared_data"], 6);
    assert_eq!((vm.costs().allocations, vm.costs().allocated_bytes), (1, 1));
}

#[test]
fn a_race_for_shared_data_can_be_staged() {
    let mut vm = start(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
            (call $say (call $get (i32.const 100) (i32.const 3) (i32.const 4) (i32.const 8) (i32.const 12)))
            (call $say (call $set (i32.const 100) (i32.const 3) (i32.const 100) (i32.const 1) (i32.load (i32.const 12))))
            (i32.const 1))"#,
    );
    let world = vm.world().clone();
    world.set_shared_data("key", b"old", 0).expect("nothing is in the way");
    world.before_cas(|world, key| world.set_shared_data(key, b"theirs", 0).expect("no CAS, no mismatch"));
    vm.start_plugin("p", "").expect("it starts");
    assert_eq!(said(&mut vm), "08");
    assert_eq!(world.shared_data("key").expect("it was written").0, b"theirs");
}

#[test]
fn the_request_headers_are_gone_once_the_request_goes_on() {
    let mut vm = start(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (call $say (call $path (i32.const 0)))
            (call $say (call $mark (i32.const 0)))
            (call $say (call $path (i32.const 2)))
            (local.get 2)) ;; hold what is complete
        (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
            (call $say (call $path (i32.const 0)))
            (call $say (call $mark (i32.const 0)))
            (call $say (call $headers (i32.const 0) (i32.const 4) (i32.const 8)))
            (call $say (i32.load (i32.const 8)))
            (call $say (call $mark (i32.const 2)))
            (i32.const 0))
        (func (export "proxy_on_log") (param i32)
            (call $say (call $path (i32.const 0)))
            (call $say (call $mark (i32.const 0)))
            (call $say (call $path (i32.const 2))))"#,
    );
    let root = vm.start_plugin("p", "").expect("it starts");
    let stream = vm.open_stream(root);
    assert_eq!(vm.request_headers(stream, REQUEST, false).expect("no trap"), Action::Continue);
    assert_eq!(said(&mut vm), "002");
    assert_eq!(vm.stream(stream).request_headers().text("x-seen"), Some("key"));
    vm.response_headers(stream, &[(":status", "200")], true).expect("no trap");
    assert_eq!(said(&mut vm), "22000", "values are refused, pairs are none");
    let stream = vm.close(stream).expect("no trap");
    assert_eq!(said(&mut vm), "021", "the log shows them once more, and they stay as they are");
    assert_eq!(stream.response_headers(), &Headers::new(&[(":status", "200"), ("x-seen", "key")]));

    // A request that is held keeps its headers.
    let held = vm.open_stream(root);
    assert_eq!(vm.request_headers(held, REQUEST, true).expect("no trap"), Action::Pause);
    said(&mut vm);
    vm.response_headers(held, &[(":status", "200")], true).expect("no trap");
    assert!(said(&mut vm).starts_with("000"));
}

const TICKING: &str = r#"
    (func (export "proxy_on_configure") (param i32 i32) (result i32)
        (drop (call $set_tick_period (i32.mul (local.get 1) (i32.const 100))))
        (i32.const 1))
    (func (export "proxy_on_tick") (param i32)
        (call $say (local.get 0))
        (drop (call $set (i32.const 100) (i32.const 3) (i32.const 100) (i32.const 1) (i32.const -1))))"#;

#[test]
fn ticks_come_in_the_order_in_which_they_fall_due() {
    let mut vm = start(TICKING);
    let world = vm.world().clone();
    vm.start_plugin("every 200 ms", "..").expect("it starts");
    let slow = vm.start_plugin("every 300 ms", "...").expect("it starts");
    let before = (world.wall_clock(), world.monotonic_clock());
    assert_eq!(vm.advance(Duration::from_millis(199)).expect("no trap"), 0);
    assert_eq!(vm.advance(Duration::from_millis(401)).expect("no trap"), 5);
    assert_eq!(said(&mut vm), "12112");
    let time = Duration::from_millis(600);
    assert_eq!((world.wall_clock(), world.monotonic_clock()), (before.0 + time, before.1 + time));

    vm.stop_plugin(slow).expect("no trap");
    assert_eq!(vm.advance(time).expect("no trap"), 3);
    assert_eq!(said(&mut vm), "111");

    // A tick that is late comes once, and the next a period after it.
    world.advance(Duration::from_secs(60));
    assert_eq!(vm.advance(Duration::from_millis(200)).expect("no trap"), 2);
}

#[test]
fn the_ticks_of_several_vms_share_a_timeline() {
    let world = World::new(0);
    let module = module(TICKING);
    let mut workers: Vec<_> = ["...", "..", ".."]
        .into_iter()
        .map(|period| {
            let mut vm = Vm::new(&world, &module).expect("the VM starts");
            vm.start_plugin("p", period).expect("it starts");
            vm
        })
        .collect();
    let start = world.monotonic_clock();
    let ticks = Arc::new(Mutex::new(Vec::new()));
    let times = Arc::clone(&ticks);
    world.before_cas(move |world, _| times.lock().unwrap().push((world.monotonic_clock() - start).as_millis()));
    assert_eq!(advance(&mut workers, Duration::from_millis(600)).expect("no trap"), 8);
    assert_eq!(*ticks.lock().unwrap(), [200, 200, 300, 400, 400, 600, 600, 600]);
}

#[test]
fn a_tick_resumes_a_request_by_its_context() {
    let mut vm = start(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (call $set_tick_period (i32.const 10))
            (return (i32.const 1)))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 1))
        (func (export "proxy_on_tick") (param i32)
            (call $say (call $set_effective_context (i32.const 2)))
            (call $say (call $mark (i32.const 0)))
            (call $say (call $continue (i32.const 0)))
            (call $say (call $mark (i32.const 0))))"#,
    );
    let root = vm.start_plugin("p", "").expect("it starts");
    let stream = vm.open_stream(root);
    assert_eq!(vm.request_headers(stream, REQUEST, true).expect("no trap"), Action::Pause);
    vm.advance(Duration::from_millis(10)).expect("no trap");
    assert_eq!(said(&mut vm), "0002", "its headers are gone as soon as it is resumed");
    assert_eq!(vm.stream(stream).request_action(), Action::Continue);
    assert_eq!(vm.stream(stream).request_headers().text("x-seen"), Some("key"));
    vm.close(stream).expect("no trap");
    vm.advance(Duration::from_millis(10)).expect("no trap");
    assert_eq!(said(&mut vm), "2202", "the root context has no request");
}

#[test]
fn a_local_reply_waits_for_the_callback_and_then_passes_the_filter() {
    let mut vm = start(
        r#"(func $out_of_stock (call $say (call $reply
            (i32.const 503) (i32.const 140) (i32.const 12) (i32.const 140) (i32.const 3)
            (i32.const 0) (i32.const 0) (i32.const -1))))
        (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (call $out_of_stock)
            (call $say (i32.const 7))
            (i32.const 0)) ;; which does not count
        (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
            (call $say (call $path (i32.const 0)))
            (call $say (call $mark (i32.const 2)))
            (call $say (local.get 1)) ;; headers
            (call $out_of_stock)      ;; too late
            (i32.const 0))
        (func (export "proxy_on_response_body") (param i32 i32 i32) (result i32)
            (call $say (local.get 1))
            (i32.const 0))"#,
    );
    let root = vm.start_plugin("p", "").expect("it starts");
    let stream = vm.open_stream(root);
    assert_eq!(vm.request_headers(stream, REQUEST, true).expect("no trap"), Action::Pause);
    assert_eq!(said(&mut vm), "07 003 0 3".replace(' ', ""));
    let stream = vm.close(stream).expect("no trap");
    let reply = stream.reply().expect("a reply");
    assert_eq!((reply.status, reply.details.as_str(), reply.grpc_status), (503, "out_of_stock", None));
    let headers = [(":status", "503"), ("content-length", "3"), ("content-type", "text/plain"), ("x-seen", "key")];
    assert_eq!(stream.response_headers(), &Headers::new(&headers));
    assert_eq!(stream.response_body(), b"out");

    // In the place of the upstream's response it goes to the client directly.
    let stream = vm.open_stream(root);
    vm.response_headers(stream, &[(":status", "200")], true).expect("no trap");
    assert_eq!(said(&mut vm), "2010");
    assert_eq!(vm.stream(stream).response_headers(), &Headers::new(&headers[..3]));
}

#[test]
fn a_trap_tells_what_the_guest_said_and_ends_the_vm() {
    let mut vm = start(
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (drop (call $log (i32.const 5) (i32.const 140) (i32.const 12)))
            unreachable)"#,
    );
    let root = vm.start_plugin("p", "").expect("it starts");
    let stream = vm.open_stream(root);
    let trap = vm.request_headers(stream, REQUEST, true).expect_err("it traps");
    assert_eq!((trap.callback, trap.log[0].level), ("proxy_on_request_headers", Level::Critical));
    let text = trap.to_string();
    assert!(text.contains("unreachable") && text.ends_with("[Critical] out of stock"), "{text}");

    let other = vm.open_stream(root);
    let text = vm.request_headers(other, REQUEST, true).expect_err("the VM has failed").to_string();
    assert!(text.contains("the VM has failed before") && text.contains("out of stock"), "{text}");
}

#[test]
fn what_is_missing_or_forbidden_says_so() {
    let calls_it = |export: &str| format!(r#"(func (export "{export}") (call $brand_new))"#);
    let trap = Vm::new(&World::new(0), &module(&calls_it("_initialize"))).expect_err("it traps");
    assert!(trap.to_string().contains("proxy_brand_new"), "{trap}");

    let early = r#"(func (export "_initialize") (drop (call $set_tick_period (i32.const 1))))"#;
    let trap = Vm::new(&World::new(0), &module(early)).expect_err("it traps");
    assert!(trap.to_string().contains("proxy_set_tick_period_milliseconds is not allowed"), "{trap}");

    let endless = r#"(func (export "_initialize") (loop $again (br $again)))"#;
    let trap = Vm::new(&World::new(0), &module(endless)).expect_err("it does not end");
    assert!(trap.to_string().contains("fuel"), "{trap}");

    let error = Module::new(b"(module)").expect_err("no ABI");
    assert!(error.to_string().contains("proxy_abi_version_0_2_1"), "{error}");
}

#[test]
fn a_configuration_can_be_refused_and_the_vm_goes_on() {
    let mut vm = start(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
            (call $say (local.get 1))
            (i32.ne (local.get 1) (i32.const 3)))"#,
    );
    let old = vm.start_plugin("p", "old!").expect("it starts");
    let refused = vm.start_plugin("p", "bad").expect_err("it is refused");
    assert!(matches!(refused, Refused::Answered { callback: "proxy_on_configure", .. }), "{refused}");
    assert_eq!(refused.log()[0].message, "3");
    let new = vm.start_plugin("p", "newer").expect("it starts");
    assert!(vm.is_running(old) && vm.is_running(new));

    // What was started lives as long as it has streams.
    let stream = vm.open_stream(old);
    vm.stop_plugin(old).expect("no trap");
    assert!(vm.is_running(old));
    vm.close(stream).expect("no trap");
    assert!(!vm.is_running(old));
}

#[test]
fn a_guest_can_put_off_its_end() {
    let mut vm = start(
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
            (drop (call $set_tick_period (i32.const 10)))
            (i32.const 1))
        (func (export "proxy_on_done") (param i32) (result i32) (call $say (call $done)) (i32.const 0))
        (func (export "proxy_on_tick") (param i32) (call $say (call $done)) (call $say (call $done)))
        (func (export "proxy_on_delete") (param i32) (call $say (i32.const 9)))"#,
    );
    let root = vm.start_plugin("p", "").expect("it starts");
    vm.stop_plugin(root).expect("no trap");
    assert!(vm.is_running(root));
    assert_eq!(vm.advance(Duration::from_millis(100)).expect("no trap"), 1);
    assert_eq!(said(&mut vm), "1 01 9".replace(' ', ""));
    assert!(!vm.is_running(root));
}

#[test]
fn two_runs_cost_the_same() {
    let run = || {
        let mut vm = start(TICKING);
        vm.start_plugin("p", ".").expect("it starts");
        vm.reset_costs();
        vm.advance(Duration::from_secs(1)).expect("no trap");
        assert_eq!(vm.memory_size(), 65536);
        vm.reset_costs()
    };
    let costs = run();
    assert_eq!(costs, run());
    assert_eq!(costs.callbacks["proxy_on_tick"].calls, 10);
    assert!(costs.fuel() > 100 && costs.host_calls() == 20, "{costs:?}");
}
