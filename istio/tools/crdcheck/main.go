// Crdcheck says whether a cluster's API server would take Istio's resources: it asks the schemas and the CEL rules of
// the custom resource definitions, and names fields that they do not know.
//
//	crdcheck crd-all.gen.yaml < manifests.yaml
//
// What istioctl validate asks is the webhook, which comes after the API server: a manifest has to pass both.
package main

import (
	"fmt"
	"io"
	"os"

	"istio.io/istio/pkg/config/crd"
)

func main() {
	if err := check(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func check() error {
	validator, err := crd.NewValidatorFromFiles(os.Args[1:]...)
	if err != nil {
		return err
	}
	// Kustomizations, Deployments and the like are no custom resources of Istio.
	validator.SkipMissing = true
	manifests, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	return validator.ValidateCustomResourceYAML(string(manifests), nil)
}
