//! What is below `istio/` is taken by the API server's schemas and rules, by Istio's webhook and by Trimtab itself; and
//! what is broken in it is refused.

use crate::tools::{Answer, answer, is_new, needs_istio, run};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use trimtab_testbed::repository;

/// The components that are meant to be added to the base, one by one.
const COMPONENTS: [&str; 5] =
    ["cluster-header", "idle-timeout", "metrics", "no-context-propagation", "upstream-filter"];

/// The folder's manifests, as `kubectl apply -k` would apply them.
pub fn render(folder: &str) -> String {
    run("kubectl", &["kustomize", folder], "").unwrap()
}

/// The base with a component of `istio/components` added.
pub fn render_with(component: &str) -> String {
    // Kustomize takes no absolute paths, and nothing above its folder but other kustomizations.
    let folder = tempfile::Builder::new().prefix("kustomize-").tempdir_in(repository().join("target")).unwrap();
    let text = format!("resources: [../../istio/base]\ncomponents: [../../istio/components/{component}]\n");
    fs::write(folder.path().join("kustomization.yaml"), text).unwrap();
    render(folder.path().to_str().unwrap())
}

/// Every folder that is applied as it is.
fn applicable() -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![repository().join("istio")];
    while let Some(folder) = open.pop() {
        let entries = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
        open.extend(entries.filter(|path: &PathBuf| path.is_dir()));
        let kustomization = fs::read_to_string(folder.join("kustomization.yaml")).unwrap_or_default();
        if kustomization.contains("kind: Kustomization") {
            found.push(folder.strip_prefix(repository()).unwrap().display().to_string());
        }
    }
    found.sort();
    assert!(found.contains(&"istio/base".to_owned()), "{found:?}");
    found
}

/// Everything below `istio/` by its name, rendered.
fn rendered() -> BTreeMap<String, String> {
    let folders = applicable().into_iter().map(|folder| (folder.clone(), render(&folder)));
    let components = COMPONENTS.map(|component| (format!("base with {component}"), render_with(component)));
    folders.chain(components).collect()
}

fn istioctl(manifests: &str) -> Answer {
    run("istioctl", &["validate", "--filename", "-"], manifests)
}

fn crdcheck(manifests: &str) -> Answer {
    let definitions = crate::tools::path("crds.yaml");
    run("crdcheck", &[definitions.to_str().unwrap()], manifests)
}

fn check(arguments: &[&str], input: &str) -> Answer {
    answer(Command::new(env!("CARGO_BIN_EXE_trimtab")).arg("check").args(arguments), input)
}

#[test]
fn every_manifest_is_valid() {
    needs_istio!();
    for (name, manifests) in rendered() {
        for (judge, answer) in [
            ("istioctl validate", istioctl(&manifests)),
            ("the schemas and rules of the API server", crdcheck(&manifests)),
        ] {
            assert!(answer.ok, "{name} is refused by {judge}: {answer:?}");
        }
        if manifests.contains("pluginConfig") {
            let answer = check(&["--strict", "-"], &manifests);
            let refused = mistakes(&answer);
            assert!(refused.is_empty(), "{name} is refused by trimtab check: {refused:?}");
        }
    }
}

#[test]
fn the_folder_is_checked_where_it_is() {
    let answer = check(&["istio/"], "");
    assert!(mistakes(&answer).is_empty() && answer.stderr.is_empty(), "{answer:?}");
    assert!(answer.stdout.contains("istio/base/wasmplugin.yaml: ok (2 routes)"), "{answer:?}");
}

/// What `trimtab check` has to say against manifests.
fn mistakes(answer: &Answer) -> Vec<&str> {
    answer.stdout.lines().filter(|line| line.contains(": error: ") || line.contains(": warning: ")).collect()
}

#[test]
fn every_component_is_tested() {
    let entries = fs::read_dir(repository().join("istio/components")).unwrap();
    let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    // These two are part of what is applied as it is.
    names.retain(|name| !["image", "trafficextension"].contains(&name.as_str()));
    assert_eq!(names, COMPONENTS);
    assert!(Path::new("istio/overlays/trafficextension/kustomization.yaml").exists());
}

/// Who has to see a fault.
#[derive(Debug, PartialEq)]
enum Judge {
    Webhook,
    Server,
}
use Judge::{Server, Webhook};

/// A folder, the fault that is put into it, what is replaced by what, and who has to say what of it.
type Case = (&'static str, &'static str, &'static str, &'static str, &'static [(Judge, &'static str)]);

#[test]
fn what_is_broken_is_refused() {
    needs_istio!();
    let cases: &[Case] = &[
        (
            "istio/base",
            "a scheme that Istio does not fetch",
            "url: oci://",
            "url: ftp://",
            &[(Webhook, "url contains unsupported scheme: ftp"), (Server, "url must have schema one of")],
        ),
        (
            "istio/base",
            "a digest that is none",
            "sha256: \"",
            "sha256: \"abc",
            &[(Webhook, "sha256"), (Server, "spec.sha256")],
        ),
        (
            "istio/base",
            "a selector and a target at once",
            "  selector:",
            "  targetRefs:\n  - {group: gateway.networking.k8s.io, kind: Gateway, name: waypoint}\n  selector:",
            &[(Webhook, "targetRef"), (Server, "only one of targetRefs or selector can be set")],
        ),
        (
            "istio/base",
            "a strategy that there is not",
            "FAIL_OPEN",
            "FAIL_MAYBE",
            &[(Webhook, "FAIL_MAYBE"), (Server, "Unsupported value: \"FAIL_MAYBE\"")],
        ),
        (
            "istio/base",
            "a misspelt field",
            "imagePullPolicy",
            "imagePullPolicie",
            &[(Webhook, "imagePullPolicie"), (Server, "unknown fields [spec.imagePullPolicie]")],
        ),
        (
            "istio/base",
            "a mode that there is not",
            "mode: CLIENT",
            "mode: BOTH",
            &[(Webhook, "BOTH"), (Server, "BOTH")],
        ),
        (
            "istio/base",
            "a destination without a host",
            "host: user-service\n        subset: v2\n  - name: v1",
            "subset: v2\n  - name: v1",
            &[(Server, "host: Required value")],
        ),
        (
            "istio/overlays/trafficextension",
            "a scheme that Istio does not fetch, in the new resource",
            "url: oci://",
            "url: ftp://",
            &[(Webhook, "unsupported scheme"), (Server, "url must have schema one of")],
        ),
        (
            "istio/overlays/gateway",
            "a protocol that there is not",
            "protocol: HTTP",
            "protocol: HTTQ",
            &[(Webhook, "HTTQ")],
        ),
    ];
    for (folder, fault, found, broken, judges) in cases {
        if folder.ends_with("trafficextension") && !is_new() {
            continue;
        }
        let sound = match folder.strip_prefix("istio/components/") {
            Some(component) => render_with(component),
            None => render(folder),
        };
        assert!(sound.contains(found), "{fault}: {found:?} is not in\n{sound}");
        let manifests = sound.replace(found, broken);
        for (judge, reason) in *judges {
            let answer = if *judge == Webhook { istioctl(&manifests) } else { crdcheck(&manifests) };
            assert!(!answer.ok, "{fault} in {folder} is taken by {judge:?}");
            let told = format!("{}{}", answer.stdout, answer.stderr);
            assert!(told.contains(reason), "{fault} in {folder}: {judge:?} was to say {reason:?}:\n{told}");
        }
    }
}
