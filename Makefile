# The one way in, for people and for CI. `make help` lists what there is.
.DEFAULT_GOAL := help
SHELL := /bin/sh
.DELETE_ON_ERROR:

MODULE := target/wasm/trimtab.wasm
COMPILED := target/wasm32-wasip1/release/trimtab.wasm
SOURCES := $(shell find src -name '*.rs') Cargo.toml Cargo.lock Makefile
CARGO ?= cargo

# No path of the machine that built it goes into the module. Less is inlined than LLVM would (225): the module is 6 %
# smaller for 3 % more instructions, which are few beside the host's, while Envoy compiles every byte at start.
REGISTRY := $(wildcard $(or $(CARGO_HOME),$(HOME)/.cargo)/registry/src/*)
export CARGO_TARGET_WASM32_WASIP1_RUSTFLAGS := -C llvm-args=-inline-threshold=50 --remap-path-prefix=$(CURDIR)=. \
	$(foreach folder,$(REGISTRY),--remap-path-prefix=$(folder)=.)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: setup build ## Try Trimtab on real traffic: Envoy, two upstreams, a tour (ONCE=1 ends after it)
	@$(CARGO) run --locked --quiet --package trimtab-testbed --bin tour -- $(if $(ONCE),--once)

.PHONY: test
test: setup setup-ratelimit format lint build ## Run everything: format, lints, unit, property, lifecycle, command-line and end-to-end tests
	$(CARGO) test --locked --workspace --features cli

.PHONY: test-istio
test-istio: setup build image ## Run what is in istio/ for real: an API server, istiod, Istio's agent, Envoy, a registry
	@istio/setup.sh
	@$(CARGO) run --locked --quiet --package trimtab-image -- $(MODULE) target/image-artifact --artifact
	TRIMTAB_ISTIO=$$(command -v go) $(CARGO) test --locked --features cli --test istio

.PHONY: build
build: setup-target $(MODULE) ## Build the module that ships, and print its size
	@printf '%s: %s KB\n' $(MODULE) $$(( ($$(wc -c < $(MODULE)) + 999) / 1000 ))

$(MODULE): $(SOURCES)
	$(CARGO) build --locked --quiet --release --lib --target wasm32-wasip1 --target-dir target
	@mkdir -p $(@D)
	$(CARGO) run --locked --quiet --features pack --bin pack -- $(COMPILED) $@

.PHONY: check
check: ## Check a policy: make check POLICY=policy.yaml
	@$(CARGO) run --locked --quiet --features cli --bin trimtab -- check $(or $(POLICY),envoy/policy.yaml)

.PHONY: bench
bench: build ## Count what a request costs inside the module, and write it into benches/COUNTS.md
	@$(CARGO) bench --locked --quiet --profile dev --bench cost

.PHONY: bench-envoy
bench-envoy: setup build ## Measure what a request costs in Envoy (PARTS="instructions memory times workers")
	@envoy/setup.sh meters
	@$(CARGO) build --locked --quiet --release --package empty_filter --package calls_filter --target wasm32-wasip1 --target-dir target
	@$(CARGO) run --locked --quiet --features pack --bin pack -- target/wasm32-wasip1/release/calls_filter.wasm target/wasm/calls_filter.wasm
	@$(CARGO) run --locked --quiet --package trimtab-testbed --bin measure -- $(PARTS)

.PHONY: image
image: build ## Make an OCI image of the module that Istio accepts, in target/image, and print its digest (ARTIFACT=1: the other layout)
	@rm -rf target/image
	@$(CARGO) run --locked --quiet --package trimtab-image -- $(MODULE) target/image $(if $(ARTIFACT),--artifact)

.PHONY: push
push: image ## Push it, and write its address and digest into istio/components/image (REGISTRY=registry.example/team)
	@istio/push.sh "$(REGISTRY)"

.PHONY: docker
docker: build ## Run the same configuration with docker compose (ENVOY_IMAGE overrides the image)
	docker compose --file envoy/compose.yaml up

.PHONY: format
format: ## Check the format
	$(CARGO) fmt --all -- --check

.PHONY: lint
lint: setup-target ## Run clippy on everything, the module included, and build the documentation
	$(CARGO) clippy --locked --quiet --workspace --all-targets --features cli,pack -- -D warnings
	$(CARGO) clippy --locked --quiet --lib --target wasm32-wasip1 -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --locked --quiet --no-deps --workspace --lib

.PHONY: setup
setup: ## Install what is missing: the wasm32-wasip1 target, Envoy, func-e
	@envoy/setup.sh

.PHONY: setup-target
setup-target:
	@envoy/setup.sh target

.PHONY: setup-ratelimit
setup-ratelimit: ## Install what global rate limits are tested with: envoyproxy/ratelimit (needs Go) and Redis
	@envoy/setup.sh ratelimit redis

.PHONY: clean
clean: ## Remove what was built
	$(CARGO) clean
