# Verbs only; each says what it does. `make demo` and `make test` are the two to know.

RELEASE := target/release
IMAGES  := target/images
LAB     := $(RELEASE)/lab

.PHONY: help demo test handoff-test fault-test fault-some handoff-perf paper traces unit soak fuzz bench lint deny setup build kernel images deb perf-images \
	paper-images app-test clean

help: ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

demo: build images ## watch a running Debian-kernel guest move from cloudlet A to cloudlet B over 10 Mbps
	$(LAB) run --narrate tests/scenarios/demo.toml

test: lint unit handoff-test fault-some ## all that CI runs: format, clippy, docs, unit and property tests, handoff-test, some faults

handoff-test: build images ## every scenario of tests/scenarios/handoff on real guests; results in target/lab/handoff-test.json
	$(LAB) run --isolate --report target/lab/handoff-test.json tests/scenarios/handoff/*.toml

fault-test: build images ## a kill and a link cut at every step of a handoff, and 200 random ones; results in target/lab/fault-test.json
	$(LAB) faults --report target/lab/fault-test.json
	$(LAB) run --isolate --timeout-s 900 --report target/lab/fault-scenarios.json tests/scenarios/faults/*.toml

# Where a handoff is lost or doubled most easily: around the commit, and in the middle of a round.
FAULTS := round-1-segment-cut paused-kill-source prepare-sent-kill-target committed-durable-kill-source \
	commit-sent-cut owner-durable-kill-target running-kill-target resumed-sent-cut

fault-some: build images
	$(LAB) faults --random 0 --report target/lab/fault-some.json $(FAULTS:%=--only %)

handoff-perf: build perf-images ## what handoffs cost: every scenario of tests/scenarios/perf; results in target/lab/handoff-perf.json
	$(LAB) run --isolate --memory-mib 10240 --timeout-s 600 --report target/lab/handoff-perf.json tests/scenarios/perf/*.toml

# QUICK=1: the short plan. PAPER: more of `lab paper`'s flags, such as PAPER="--table peers".
paper: build images $(if $(QUICK),,paper-images) ## the evaluation, QEMU beside us: records and a page of them in target/paper; resumable; hours, QUICK=1 less
	scripts/setup --peers
	$(LAB) paper $(if $(QUICK),--quick) $(PAPER)

traces: build perf-images ## what the lab's applications change, and when: target/traces/*.trace, for `howdah trace play` and bench
	$(LAB) run --isolate --memory-mib 10240 --timeout-s 600 --report target/lab/traces.json tests/scenarios/traces/*.toml
	mkdir -p target/traces
	cp target/lab/trace-*/*.trace target/traces/

unit: setup ## unit and property tests
	cargo test --workspace

soak: setup ## 10,000 random segments, whole and damaged, and the engine's tests, under address sanitizer (x86-64)
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address CARGO_TARGET_DIR=target/soak \
		cargo test --target x86_64-unknown-linux-gnu -p handoff --test soak --test engine -- --include-ignored --nocapture

fuzz: setup ## every fuzz target for ten minutes, with coverage and address sanitizer (x86-64); FUZZ="-s 60 batch" for others
	fuzz/run $(FUZZ)

bench: setup ## the engine's stages against memcmp, BLAKE3 and zstd; results in target/bench/engine.json
	cargo run --release --quiet --package howdah-bench

lint: setup ## format, clippy, docs: warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --quiet

deny: ## licences, sources and bans of every dependency (advisories too, where the database can be fetched)
	@command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny check bans licenses sources

setup: ## install the Debian packages that the lab and the images need, or say which are missing
	@scripts/setup

build: setup ## the binaries, optimised
	cargo build --release --workspace

deb: build ## an installable Debian package in target/deb, tried in a root directory of its own
	scripts/deb --check "$$(scripts/deb)"

images: setup build ## kernels from Debian and the minimal guest image
	kernel/fetch
	guest-images/recipes/build minimal $(IMAGES)/minimal

perf-images: images ## those of handoff-perf: one with OpenCV (needs a network), one with a larger disk
	guest-images/recipes/build opencv $(IMAGES)/opencv
	HOWDAH_DISK_MIB=512 guest-images/recipes/build minimal $(IMAGES)/minimal-512

paper-images: setup build ## guests of the paper's applications: fluid, vision, desktop (8 GiB sparse each; needs a network)
	kernel/fetch
	for image in fluid vision desktop; do guest-images/recipes/build $$image $(IMAGES)/$$image || exit 1; done

app-test: build ## the vision applications with their client, outside a guest; needs python3-opencv and opencv-data
	HOWDAH_APP=$(abspath $(RELEASE)/howdah-app) guest-images/recipes/vision/test

kernel: setup ## build the small guest kernel from Debian's linux-source; nothing else needs it
	kernel/build

clean: ## remove everything that was built
	rm -rf target
