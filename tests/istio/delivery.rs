//! What is applied arrives: istiod turns it into Envoy's configuration, and Envoy does what the policy says.

use crate::manifests::render;
use crate::mesh::{Mesh, call, settled};
use crate::tools::needs_istio;

#[tokio::test]
async fn the_base_steers_what_leaves_the_caller() {
    needs_istio!();
    let mesh = Mesh::start().await;
    mesh.apply(&render("istio/base"));
    let _envoy = mesh.sidecar("storefront").await;
    let client = mesh.outbound();
    let tester = call("/").header("x-canary", "true");
    settled("testers to be on v2", &client, tester, |response| response.version() == "v2").await;
    let seen = mesh.v2.next_request().await;
    assert_eq!(seen.header("x-trimtab-subset"), Some("v2"));
}
