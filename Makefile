# Everything that is done with this repository, from a bare clone: CI runs the same targets.
# All downloads and built tools stay below .cache/ (git-ignored), except what Go and uv keep in
# their own caches.

SHELL      := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CACHE := $(CURDIR)/.cache
BIN   := $(CACHE)/bin
VENV  := $(CACHE)/tools
# Tools that the Makefile brings come first, so that lint and generation use the pinned ones.
export PATH := $(BIN):$(PATH)
export GOLANGCI_LINT_CACHE := $(CACHE)/golangci-lint
# A clone owned by somebody else makes `go build` fail on git's "dubious ownership": no stamp then.
export GOFLAGS := $(filter-out -buildvcs%,$(GOFLAGS)) -buildvcs=false
STAMP := $(if $(shell git rev-parse HEAD 2>/dev/null),-buildvcs=auto)

GO           ?= go
UV_VERSION   ?= 0.13.9
BUF_VERSION  ?= 1.75.0
# The race detector needs a C compiler; the product itself is built without cgo.
RACE         := $(if $(shell command -v gcc || command -v clang),-race)
PKG          ?= ./...
RUN          ?=
TEST_TIMEOUT ?= 40m
FUZZTIME     ?= 10s
SOAKTIME     ?= 10m
BENCH        ?=
PARITY       ?=

##@ Every day

.PHONY: help
help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\nVariables: PKG=./internal/link RUN=TestName FUZZTIME=%s SOAKTIME=%s BENCH="--rounds 3"\n' '$(FUZZTIME)' '$(SOAKTIME)'

.PHONY: build
build: ## Build the static binary bin/pergola
	CGO_ENABLED=0 $(GO) build $(STAMP) -trimpath -o bin/pergola ./cmd/pergola

.PHONY: demo
demo: build needs ## Run the quickstart app across a hub and two sites on this machine
	bin/pergola run examples/quickstart

.PHONY: test
test: needs needs-postgres needs-services $(BIN)/gotestsum ## Run every test, with the race detector where a C compiler is there
	@$(if $(RACE),,echo 'no C compiler: testing without the race detector' >&2)
	CGO_ENABLED=$(if $(RACE),1,0) gotestsum --format pkgname-and-test-fails --format-hide-empty-pkg -- \
	  $(RACE) -timeout $(TEST_TIMEOUT) $(if $(RUN),-run '$(RUN)') $(PKG)

.PHONY: lint
lint: $(BIN)/golangci-lint $(BIN)/gofumpt needs-buf ## Check style, vet, linters, API and generated code
	@$(MAKE) --keep-going lint-format lint-vet lint-go lint-tidy $(if $(wildcard $(CURDIR)/proto),lint-proto)

.PHONY: lint-format lint-vet lint-go lint-tidy lint-proto
lint-format:
	@bad=$$(gofumpt -l $$(git ls-files -co --exclude-standard '*.go' | grep -v '^internal/api/pergola/')); if [ -n "$$bad" ]; then \
	  printf 'not in gofumpt style (fix with: make fmt):\n%s\n' "$$bad" >&2; exit 1; fi
lint-vet:
	$(GO) vet ./...
lint-go:
	golangci-lint run ./...
lint-tidy:
	$(GO) mod tidy -diff
lint-proto: $(BIN)/protoc-gen-go $(BIN)/protoc-gen-connect-go
	@if ! buf --version >/dev/null 2>&1; then echo 'no buf here: API and generated code not checked' >&2; exit 0; fi; \
	buf lint; \
	out=$$(mktemp -d "$${TMPDIR:-/tmp}/pergola-gen.XXXXXX"); trap 'rm -rf "$$out"' EXIT; \
	buf generate -o "$$out"; \
	diff -r "$$out/internal/api/pergola" internal/api/pergola >&2 || { echo 'generated code is not what proto/ says (fix with: make gen)' >&2; exit 1; }

.PHONY: fmt
fmt: $(BIN)/gofumpt ## Format all Go code
	gofumpt -w $$(git ls-files -co --exclude-standard '*.go' | grep -v '^internal/api/pergola/')

.PHONY: gen
gen: $(BIN)/protoc-gen-go $(BIN)/protoc-gen-connect-go needs-buf ## Generate Go code from proto/
	buf generate

##@ Now and then

.PHONY: race
race: ## Run the tests of one package many times under the race detector (PKG=…)
	CGO_ENABLED=1 $(GO) test -race -count 20 -timeout $(TEST_TIMEOUT) $(PKG)

.PHONY: fuzz
fuzz: ## Run every fuzz target for FUZZTIME
	tools/fuzz.sh $(FUZZTIME) $(filter-out ./...,$(PKG))

.PHONY: soak
soak: ## Run the whole table of faults, then every fuzz target and faults of the link by random seeds, for SOAKTIME each
	$(GO) test ./test/e2e -run TestFaults -faults -long-faults -timeout 90m
	$(GO) test ./test/e2e -run TestLargeParameters -big -timeout 30m
	$(GO) test ./test/parity -run TestEngines -whole -timeout 90m
	$(GO) test ./internal/doctor -run TestDeep -deep
	$(GO) test ./internal/hub -run TestManyQueued -queued 10000
	$(GO) test ./internal/native/python -every-flwr -timeout 60m
	$(GO) test ./test/chaos -run "TestSoak|TestLanes" -timeout 0 -soak $(SOAKTIME)
	tools/fuzz.sh $(SOAKTIME) $(filter-out ./...,$(PKG))

.PHONY: bench
bench: build needs ## Compare with plain Flower in one run: both engines, small and large models, many clients (BENCH="small --quick"); then bench-hub
	$(GO) run ./test/bench $(or $(BENCH),all)
	$(if $(BENCH),,$(GO) run ./test/bench hub --pergola bin/pergola)

.PHONY: bench-link
bench-link: ## Measure the link beside TCP and TLS alone, and with 1,000 sites (BENCH="--help")
	$(GO) run ./test/bench link $(BENCH)

.PHONY: bench-hub
bench-hub: build ## Measure a hub with 10, 100 and 1,000 sites and 10,000 queued jobs (BENCH="--help")
	$(GO) run ./test/bench hub --pergola bin/pergola $(BENCH)

.PHONY: parity
parity: build needs ## Compare with plain Flower, engine by engine and version by version (PARITY="--only 1.30.0"); writes docs/parity.md and docs/flower-versions.md
	$(GO) run ./test/parity --pergola bin/pergola $(PARITY)

.PHONY: clean
clean: ## Remove what was built; the caches stay (remove .cache/ for those)
	rm -rf bin pergola-runs

##@ Tools (the targets above call these)

.PHONY: needs needs-postgres needs-services needs-buf
needs: ## See to it that Python and uv are there
	@tools/needs.sh python uv==$(UV_VERSION)

needs-postgres:
	@tools/needs.sh postgres

needs-services:
	@tools/needs.sh services

needs-buf:
	@tools/needs.sh buf buf-bin==$(BUF_VERSION)

# Each tool is built once from the versions in tools/go.mod, and again when those change.
$(BIN)/golangci-lint: PKGPATH = github.com/golangci/golangci-lint/v2/cmd/golangci-lint
$(BIN)/gofumpt: PKGPATH = mvdan.cc/gofumpt
$(BIN)/gotestsum: PKGPATH = gotest.tools/gotestsum
$(BIN)/protoc-gen-go: PKGPATH = google.golang.org/protobuf/cmd/protoc-gen-go
$(BIN)/protoc-gen-connect-go: PKGPATH = connectrpc.com/connect/v2/cmd/protoc-gen-connect-go
$(BIN)/golangci-lint $(BIN)/gofumpt $(BIN)/gotestsum $(BIN)/protoc-gen-go $(BIN)/protoc-gen-connect-go: tools/go.mod
	@mkdir -p $(BIN)
	@echo 'building $(@F) (once$(if $(findstring golangci,$@),; two minutes or more))' >&2
	@$(GO) build -C tools -o $@ $(PKGPATH)
	@touch $@
