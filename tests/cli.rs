//! The command-line program as its users run it.
//!
//! What it says of the files in `policies/good` and `policies/bad` stands beside each of them, what it explains and
//! simulates stands in `policies/explain` and `policies/simulate`, each with its command in the first line.
//! `TRIMTAB_UPDATE=1` writes them anew.

use proptest::prelude::*;
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the program answered.
#[derive(Debug)]
struct Answer {
    code: i32,
    stdout: String,
    stderr: String,
}

fn policies() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policies")
}

fn run_in(folder: &Path, arguments: &[&str], input: &[u8]) -> Answer {
    let mut child = Command::new(env!("CARGO_BIN_EXE_trimtab"))
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || {
        // The program may have seen enough before the end.
        let _ = stdin.write_all(&input);
    });
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    Answer {
        code: output.status.code().expect("the program ends by itself"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn run(arguments: &[&str]) -> Answer {
    run_in(&policies(), arguments, b"")
}

fn check(input: impl AsRef<[u8]>) -> Answer {
    run_in(&policies(), &["check", "-"], input.as_ref())
}

/// Compares `found` with the file, or writes the file.
fn assert_golden(file: &Path, found: &str) {
    if std::env::var_os("TRIMTAB_UPDATE").is_some() {
        fs::write(file, found).unwrap();
    }
    let expected = fs::read_to_string(file).unwrap_or_default();
    assert_eq!(found, expected, "{}: run with TRIMTAB_UPDATE=1 if this is as it should be", file.display());
}

/// The files in a folder that are no expectations.
fn fixtures(folder: &str) -> Vec<String> {
    let entries = fs::read_dir(policies().join(folder)).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| !name.ends_with(".txt"));
    names.sort();
    assert!(!names.is_empty());
    names
}

#[test]
fn what_check_says_of_every_fixture() {
    for (folder, code) in [("good", 0), ("bad", 1)] {
        for name in fixtures(folder) {
            let answer = run_in(&policies().join(folder), &["check", &name], b"");
            assert_golden(&policies().join(folder).join(format!("{name}.txt")), &answer.stdout);
            assert_eq!((answer.code, answer.stderr.as_str()), (code, ""), "{folder}/{name}");
        }
    }
}

/// Splits a command line that quotes with nothing but ''.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            c => words.last_mut().unwrap().push(c),
        }
    }
    words
}

/// Runs the command in the first line of a file, and compares what it says with the rest.
fn assert_transcript(file: &Path) -> Answer {
    let text = fs::read_to_string(file).unwrap();
    let command = text.lines().next().unwrap();
    let words = words(command.strip_prefix("$ trimtab ").unwrap());
    let answer = run(&words.iter().map(String::as_str).collect::<Vec<_>>());
    assert_golden(file, &format!("{command}\n{}{}", answer.stderr, answer.stdout));
    answer
}

#[test]
fn what_explain_and_simulate_say() {
    for folder in ["explain", "simulate"] {
        for entry in fs::read_dir(policies().join(folder)).unwrap() {
            let answer = assert_transcript(&entry.unwrap().path());
            assert_eq!(answer.code, 0, "{answer:?}");
        }
    }
}

#[test]
fn what_import_makes() {
    for (name, code) in [("reviews", 0), ("hosts", 0), ("impossible", 1)] {
        let answer = assert_transcript(&policies().join(format!("import/{name}.txt")));
        assert_eq!(answer.code, code, "{answer:?}");
        if code == 0 {
            let checked = check(&answer.stdout);
            assert_eq!((checked.code, checked.stderr.as_str()), (0, ""), "{checked:?}");
        } else {
            assert_eq!(answer.stdout, "", "nothing half done");
        }
    }
}

#[test]
fn the_readme_shows_what_explain_and_simulate_say() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    for command in ["explain", "simulate"] {
        let start = format!("```console\n$ trimtab {command} ");
        let shown = readme.split(&start).skip(1);
        let shown: Vec<(&str, &str)> = shown.filter_map(|block| block.split("```").next()?.split_once('\n')).collect();
        assert!(!shown.is_empty());
        for (arguments, expected) in shown {
            let words = words(&format!("{command} {arguments}"));
            let answer = run_in(root, &words.iter().map(String::as_str).collect::<Vec<_>>(), b"");
            assert_eq!(answer.stdout, expected, "README.md: trimtab {command} {arguments}");
        }
    }
}

#[test]
fn json_is_one_list_with_the_same_findings() {
    for name in ["many-errors.yaml", "wasmplugin.yaml", "tabs.yaml", "syntax.json"] {
        let folder = policies().join("bad");
        let text = run_in(&folder, &["check", name], b"");
        let json = run_in(&folder, &["check", "--format", "json", name], b"");
        assert_eq!((json.code, json.stderr.as_str()), (1, ""));
        let findings: Vec<Value> = serde_json::from_str(&json.stdout).unwrap();
        let lines: Vec<String> = findings
            .iter()
            .map(|finding| {
                let text = |field: &str| finding[field].as_str().unwrap().to_owned();
                let place = Some(text("pointer")).filter(|pointer| !pointer.is_empty());
                let help = Some(text("help")).filter(|help| !help.is_empty()).map(|help| format!("; {help}"));
                format!(
                    "{}:{}:{}: {}: {}: {}{}",
                    text("file"),
                    finding["line"],
                    finding["column"],
                    text("severity"),
                    place.unwrap_or("document".into()),
                    text("found"),
                    help.unwrap_or_default()
                )
            })
            .collect();
        let told: Vec<&str> = text.stdout.lines().collect();
        assert_eq!(lines, told[..told.len() - 1], "{name}");
    }
    let fine = run(&["check", "--format", "json", "good/minimal.yaml"]);
    assert_eq!((fine.code, fine.stdout.as_str()), (0, "[]\n"));
}

#[test]
fn exit_codes() {
    let code = |arguments: &[&str]| run(arguments).code;
    assert_eq!(code(&["check", "good/minimal.yaml"]), 0);
    assert_eq!(code(&["check", "good/warnings.yaml"]), 0);
    assert_eq!(code(&["check", "--strict", "good/warnings.yaml"]), 1);
    assert_eq!(code(&["check", "good/minimal.yaml", "bad/tabs.yaml"]), 1);
    assert_eq!(code(&["check", "bad/tabs.yaml", "no-such-file.yaml"]), 2, "the rest is checked all the same");
    assert_eq!(code(&["explain", "bad/tabs.yaml", "--request", "/"]), 1);
    assert_eq!(code(&["simulate", "bad/tabs.yaml", "--request", "/"]), 1);
    for usage in [
        &["check"][..],
        &["check", "--format", "xml", "good/minimal.yaml"],
        &["explain", "good/minimal.yaml"],
        &["explain", "good/minimal.yaml", "--request", "GET"],
        &["explain", "good/minimal.yaml", "--request", "GET / HTTP/1.1"],
        &["explain", "good/minimal.yaml", "--request", "/", "-H", "x-user-id"],
        &["explain", "good/minimal.yaml", "--request", "/", "-H", ":path: /"],
        &["explain", "good/minimal.yaml", "--request", "/", "-H", "a: b\nc: d"],
        &["explain", "good/minimal.yaml", "--request", "/", "--property", "x"],
        &["explain", "good/minimal.yaml", "--request", "/", "--scheme", "ftp"],
        &["explain", "good/minimal.yaml", "--request", "/", "--seed", "-1"],
        &["explain", "no-such-file.yaml", "--request", "/"],
        &["explain", "good/trafficextension.yaml", "--request", "/"],
        &["explain", "good", "--request", "/"],
        &["simulate", "good/minimal.yaml"],
        &["simulate", "good/minimal.yaml", "-r", "/", "--for", "0s"],
        &["simulate", "good/minimal.yaml", "-r", "/", "--for", "10"],
        &["simulate", "good/minimal.yaml", "-r", "/", "--for", "24h", "--rate", "1000"],
        &["simulate", "good/minimal.yaml", "-r", "/", "--rate", "0"],
        &["simulate", "good/minimal.yaml", "-r", "/", "--users", "0"],
        &["simulate", "good/minimal.yaml", "-r", "/", "--failures", "5"],
        &["simulate", "good/user-service.yaml", "-r", "/", "--failures", "nobody=5%"],
        &["simulate", "good/user-service.yaml", "-r", "/", "--latency", "v1=fast"],
        &["simulate", "good/user-service.yaml", "-r", "/", "--failures", "v1=5%@2m..1m"],
        &["cohort", "ann"],
        &["cohort", "--rollout", "", "ann"],
        &["chekc"],
    ] {
        let answer = run(usage);
        assert_eq!((answer.code, answer.stdout.as_str()), (2, ""), "{usage:?}");
        assert!(!answer.stderr.is_empty(), "{usage:?}");
    }
}

#[test]
fn help_has_examples() {
    for command in ["check", "explain", "simulate", "import", "cohort"] {
        let answer = run(&[command, "--help"]);
        assert_eq!(answer.code, 0);
        assert!(answer.stdout.contains(&format!("Examples:\n  trimtab {command}")), "{}", answer.stdout);
    }
    assert!(run(&["--help"]).stdout.contains("Exit codes:"));
}

#[test]
fn standard_input_is_a_file_too() {
    let policy = fs::read(policies().join("good/user-service.yaml")).unwrap();
    assert_eq!(check(&policy).stdout, "<stdin>: ok (5 routes)\n");
    let policy = fs::read(policies().join("good/user-service.json")).unwrap();
    assert_eq!(check(&policy).stdout, "<stdin>: ok (1 route)\n");
    let answer = run_in(&policies(), &["explain", "-", "--request", "/"], &policy);
    assert_eq!((answer.code, answer.stderr.as_str()), (0, ""));
    let answer = run_in(&policies(), &["explain", "-", "-r", "/"], b"kind: Service\n");
    assert_eq!((answer.code, answer.stdout.as_str()), (1, ""), "{}", answer.stderr);
    assert!(answer.stderr.starts_with("<stdin>:1:1: error: "), "{}", answer.stderr);
}

#[test]
fn a_folder_is_looked_through() {
    let folder = std::env::temp_dir().join(format!("trimtab-cli-{}", std::process::id()));
    fs::create_dir_all(folder.join("deep/.hidden")).unwrap();
    let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
    let policy = "apiVersion: trimtab/v1alpha1\nname: a\n";
    write("b.yaml", policy);
    write("deep/a.yml", policy);
    let bad = r#"{"apiVersion": "trimtab/v1alpha1", "name": "C"}"#;
    write("deep/c.json", bad);
    write("deep/.hidden/d.yaml", "apiVersion: trimtab/v1alpha1\nname: [");
    write("template.yaml", "{{ if .Values.x }}\n\tno yaml");
    write("service.yaml", "apiVersion: v1\nkind: Service\nmetadata: {name: trimtab-metrics}\n");
    write("values.yaml", "image: trimtab\n");
    write("notes.txt", policy);
    let answer = run_in(&folder, &["check", "--verbose", "."], b"");
    let nested = "./deep/c.json:1:36: error: /name: found \"C\"; expected 1 to 63 of a-z, 0-9 and -\n";
    assert_eq!(
        answer.stdout,
        format!("./b.yaml: ok (0 routes)\n./deep/a.yml: ok (0 routes)\n{nested}./deep/c.json: 1 error\n")
    );
    assert_eq!((answer.code, answer.stderr.as_str()), (1, "./service.yaml: passed over Service trimtab-metrics\n"));
    let explained = run_in(&folder, &["explain", "deep", "-r", "/"], b"");
    assert_eq!((explained.code, explained.stdout.as_str()), (1, ""), "one of its policies has an error");
    fs::remove_file(folder.join("deep/c.json")).unwrap();
    let explained = run_in(&folder, &["explain", "deep", "-r", "/"], b"");
    assert_eq!((explained.code, explained.stderr.as_str()), (0, ""), "a folder with one policy is as good as its file");
    write("deep/c.json", bad);
    let none = run_in(&folder, &["check", "deep/.hidden/.."], b"");
    assert_eq!(none.code, 1);
    fs::remove_file(folder.join("deep/.hidden/d.yaml")).unwrap();
    let none = run_in(&folder, &["check", "deep/.hidden"], b"");
    assert_eq!((none.code, none.stdout.as_str()), (2, ""));
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn input_of_every_bad_kind_is_refused_in_words() {
    let large = [b"name: a # ".as_slice(), &vec![b'x'; 10 << 20]].concat();
    let deep = |open: &str| open.repeat(100_000).into_bytes();
    for (input, expected) in [
        (large, "more than 1048576 bytes"),
        (Vec::new(), "an empty file"),
        (b" \n\n".to_vec(), "an empty file"),
        (vec![0; 1000], "not valid YAML"),
        ((0..=255).collect(), "not UTF-8"),
        (deep("["), "levels deep"),
        (deep("{a: "), "levels deep"),
        (deep("- "), "levels deep"),
        (deep("? "), "levels deep"),
        (b"a: *b\n".to_vec(), "unknown anchor"),
        (b"\xef\xbb\xbfname: a\n".to_vec(), "apiVersion is missing"),
        (b"- a\n- b\n".to_vec(), "found a list; expected an object"),
    ] {
        let answer = check(&input);
        assert_eq!((answer.code, answer.stderr.as_str()), (1, ""), "{expected}");
        assert!(answer.stdout.contains(expected), "{expected}: {}", answer.stdout);
        assert!(answer.stdout.len() < 1000, "short, whatever was fed in");
    }
}

#[test]
fn a_flood_of_errors_is_cut() {
    let routes: String = (0..500).map(|n| format!("- {{name: r{n}, match: 1}}\n")).collect();
    let answer = check(format!("apiVersion: trimtab/v1alpha1\nname: a\nroutes:\n{routes}"));
    let lines: Vec<&str> = answer.stdout.lines().collect();
    assert_eq!(lines.len(), 102);
    assert!(lines[100].contains("more errors are not shown"), "{}", lines[100]);
}

#[test]
fn nothing_in_a_file_reaches_the_terminal_as_a_command() {
    let answer = check("apiVersion: trimtab/v1alpha1\nname: a\n\"\\e[31m\\nred\": 1\n");
    assert!(answer.stdout.contains(r"/\u{1b}[31m\nred: unknown field"), "{}", answer.stdout);
    assert_eq!(answer.stdout.lines().count(), 2);
}

#[test]
fn a_seed_repeats_what_was_drawn() {
    let explain =
        |seed: &[&str]| run(&[&["explain", "good/user-service.yaml", "--request", "/users"], seed].concat()).stdout;
    assert_eq!(explain(&["--seed", "1"]), explain(&["--seed", "1"]));
    assert_ne!(explain(&["--seed", "1"]), explain(&["--seed", "2"]));
    let drawn = explain(&[]);
    let seed = drawn.split("--seed ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
    assert_eq!(explain(&["--seed", seed]), drawn);
}

#[test]
fn what_is_simulated_depends_on_the_seed_alone() {
    let simulate = |seed: &str| {
        let arguments = ["simulate", "good/user-service.yaml", "-r", "/users", "--for", "10s", "--failures", "50%"];
        run(&[&arguments[..], &["--seed", seed]].concat()).stdout
    };
    assert_eq!(simulate("1"), simulate("1"));
    assert_ne!(simulate("1").replace("--seed 1", "--seed 2"), simulate("2"));
}

#[test]
fn every_request_of_a_simulation_is_told_once() {
    for policy in ["good/user-service.yaml", "good/faults.yaml", "good/experiment.yaml", "good/ratelimit.yaml"] {
        let arguments = ["simulate", policy, "-r", "/users", "--for", "20s", "--failures", "10%", "--format", "json"];
        let answer = run(&arguments);
        let story: Value = serde_json::from_str(&answer.stdout).unwrap();
        let sum = |list: &str, field: &str| {
            story[list].as_array().unwrap().iter().map(|entry| entry[field].as_u64().unwrap()).sum::<u64>()
        };
        let told = sum("seen", "count") + story["underWay"].as_u64().unwrap();
        assert_eq!((story["requests"].as_u64(), told), (Some(2000), 2000), "{policy}: {}", answer.stdout);
        assert!(sum("sent", "requests") <= 2000, "{policy}");
    }
}

#[test]
fn places_are_those_of_the_cohort() {
    let expected = "114621\tann\n677989\tbob\n";
    assert_eq!(run(&["cohort", "--rollout", "2026-11-new-ranking", "ann", "bob"]).stdout, expected);
    let piped = |arguments: &[&str], input: &[u8]| run_in(&policies(), arguments, input).stdout;
    assert_eq!(piped(&["cohort", "--rollout", "2026-11-new-ranking"], b"ann\r\nbob"), expected);
    assert_eq!(piped(&["cohort", "--rollout", "2026-11-new-ranking", "-"], b"ann\nbob\n"), expected);
}

#[test]
#[cfg(unix)]
fn a_reader_that_goes_away_is_no_crash() {
    let shell = |script: &str| {
        let program = env!("CARGO_BIN_EXE_trimtab");
        let output = Command::new("sh").args(["-c", script, "sh", program]).current_dir(policies()).output().unwrap();
        String::from_utf8(output.stderr).unwrap()
    };
    assert_eq!(shell("yes | \"$1\" cohort --rollout r | head -n 1 >/dev/null"), "");
    assert_eq!(shell("\"$1\" check bad/many-errors.yaml | true"), "");
    assert_eq!(shell("\"$1\" explain good/user-service.yaml --request / | true"), "");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn any_bytes_get_an_answer(
        start in prop::sample::select(vec!["", "apiVersion: trimtab/v1alpha1\nname: a\nroutes:\n", "{\"apiVersion\": ", "kind: List\nitems:\n"]),
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..100),
            r"([ \n\t:?\-,{}\[\]&*!|>'#a-c0-9]|- |: |name|match|route){0,60}".prop_map(String::into_bytes),
        ],
    ) {
        let answer = check([start.as_bytes(), &bytes].concat());
        prop_assert!(matches!(answer.code, 0 | 1), "{answer:?}");
        prop_assert!(answer.stderr.is_empty() && !answer.stdout.is_empty(), "{answer:?}");
    }

    #[test]
    fn anything_is_imported_or_not(
        spec in r"([ \n:\-,{}\[\]'a-c0-9]|- |: |\n  http:|\n  - |\n    |match|route|destination: |host: |subset: |weight: |hosts: |fault: |name: ){0,40}",
    ) {
        let manifest = format!("kind: VirtualService\nmetadata: {{name: a}}\nspec:\n  hosts: [a]{spec}\n");
        let answer = run_in(&policies(), &["import", "-"], manifest.as_bytes());
        prop_assert!(matches!(answer.code, 0..=2), "{answer:?}");
        prop_assert!((answer.code == 0) != answer.stdout.is_empty(), "{answer:?}");
        if answer.code == 0 {
            let checked = check(&answer.stdout);
            prop_assert_eq!(checked.code, 0, "{:?} of {}", checked, answer.stdout);
        }
    }

    #[test]
    fn any_header_gets_an_answer(header in r"\PC{0,20}", target in r"/?\PC{0,20}") {
        let header = format!("--header={header}");
        let target = format!("--request={target}");
        let answer = run(&["explain", "good/user-service.yaml", &target, &header]);
        prop_assert!(matches!(answer.code, 0 | 2), "{answer:?}");
    }
}
