# Everything a developer types. A line with two # signs is what `make help` shows.
# .py files need nothing after an edit; .pyx and .pxd files need `make build`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AUDIT := .cache/audit
# Hashes of PyPI's own files: neither this machine's index nor its folders of wheels are asked.
COMPILE := PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS= CUSTOM_COMPILE_COMMAND="make lock" \
	$(AUDIT)/bin/pip-compile -q --upgrade --generate-hashes --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-find-links
LOOK_UP := $(AUDIT)/bin/pip-audit --disable-pip --require-hashes \
	-r requirements/run.txt -r requirements/build.txt
LOOPS := $(wildcard ambassador/*.pyx)
LOOP_SOURCES := $(LOOPS) $(wildcard ambassador/*.pxd)

# Programs that tests run beside the Engine, each with the Debian package that brings it.
TEST_PROGRAMS := ip=iproute2 strace=strace redis-server=redis-server redis-cli=redis-tools \
	dnsmasq=dnsmasq-base iptables=iptables
BENCH_PROGRAMS := ip=iproute2 haproxy=haproxy nginx=nginx-core docker-proxy=docker.io redis-server=redis-server \
	redis-benchmark=redis-tools iperf3=iperf3 wrk=wrk sockperf=sockperf
# Programs that bring other engines up.
ENGINE_PROGRAMS := debootstrap=debootstrap unshare=util-linux nsenter=util-linux

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build demo test test-sanitize test-engines mutants fuzz soak bench lint package reference image lock audit clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(VENV)/built ## Create .venv and compile the relay loops (does nothing when up to date)

demo: ## Watch clients talk to redis and dnsmasq while these are restarted with new addresses
	@scripts/toolchain.sh $(PYTHON)
	@$(PYTHON) scripts/demo.py

test: build ## Run every test, starting an Engine for those that need one (ARGS='-k name' for some)
	@$(PYTHON) scripts/debian.py $(TEST_PROGRAMS) || true
	@# If there is no Engine the Docker tests fail, each with the reason; the others still run.
	@$(PYTHON) scripts/images.py || true
	$(BIN)/python -m pytest -n 4 $(ARGS)

test-sanitize: build ## Run the tests of the loops under ASan and UBSan; minutes (ARGS='tests/loops -k tcp')
	$(BIN)/python -m tests.sanitize $(ARGS)

test-engines: build ## Run the image on Docker 20 to 28 and Podman 5 and 6; minutes each (ENGINES="docker20 podman*" SCENARIOS= JOBS=2 RECORD=1)
	@$(PYTHON) scripts/debian.py $(ENGINE_PROGRAMS)
	@$(PYTHON) scripts/images.py
	$(BIN)/python -m tests.engines --engines "$(ENGINES)" --scenarios "$(SCENARIOS)" $(if $(JOBS),--jobs $(JOBS)) $(if $(RECORD),--record)

fuzz: build ## Feed nonsense to all that strangers can write to (MINUTES=5); keeps what it finds
	$(BIN)/python -m tests.fuzz $(or $(MINUTES),5)

soak: build ## Run the long scenarios, each for MINUTES=2, and print figures (SEED=1 ARGS='-k chaos')
	@$(PYTHON) scripts/images.py || true
	SOAK_MINUTES=$(or $(MINUTES),2) SOAK_SEED=$(SEED) $(BIN)/python -m pytest -v --capture=sys \
		--timeout=0 -o addopts= tests/soak $(ARGS)

mutants: build ## Break it in one place at a time and see the test that must notice (WORDS="T9 U5"; minutes)
	$(BIN)/python -m tests.mutants $(WORDS)

bench: build ## Compare with other relays; minutes (ROWS=bulk1,udp64 PEERS=direct,ambassador,haproxy ROUNDS=3 CORE=0 OUTPUT=file)
	@$(PYTHON) scripts/debian.py $(BENCH_PROGRAMS) || true
	$(BIN)/python -m bench.run --rows "$(ROWS)" --peers "$(PEERS)" --rounds "$(or $(ROUNDS),3)" $(if $(CORE),--core $(CORE)) $(if $(OUTPUT),--output "$(OUTPUT)")

lint: build ## Check style and types, and that the C compiler has nothing to say
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH=$(BIN):$$PATH cython-lint --max-line-length=110 $(LOOP_SOURCES)
	@echo "building with -Werror"
	@rm -rf build/lint
	@CFLAGS=-Werror $(BIN)/python setup.py -q build_ext --build-lib build/lint --build-temp build/lint

package: build ## Build the source distribution, and from it alone a wheel that runs (dist/)
	rm -rf dist build/package
	$(BIN)/python setup.py -q sdist
	$(BIN)/pip wheel -q --disable-pip-version-check --no-build-isolation --no-deps -w dist dist/*.tar.gz
	$(PYTHON) -m venv --system-site-packages build/package
	build/package/bin/pip install -q --disable-pip-version-check --no-deps --no-index dist/*.whl
	cd build/package && PYTHONPATH=$$(../../$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		bin/grand-ambassador -version

reference: build ## Print docs/reference.md from the tables of options and counters
	$(BIN)/python -m ambassador.cli.usage > docs/reference.md

image: ## Build the image, tagged grand-ambassador
	@scripts/toolchain.sh $(PYTHON)
	@$(PYTHON) scripts/images.py ambassador

lock: $(AUDIT)/installed ## Choose the image's Python packages anew and write down their hashes (requirements/)
	$(COMPILE) -o requirements/run.txt pyproject.toml
	$(COMPILE) --build-deps-for=wheel --only-build-deps -o requirements/build.txt pyproject.toml

audit: $(AUDIT)/installed ## Ask whether a locked package has a known vulnerability; write build/sbom.cdx.json
	@mkdir -p build
	@$(AUDIT)/bin/cyclonedx-py requirements requirements/run.txt --pyproject pyproject.toml \
		--output-reproducible --of JSON -o build/sbom.cdx.json 2> /dev/null
	$(LOOK_UP)
	@# The table above names what could not be looked up: a failure too, not a pass.
	@$(LOOK_UP) --strict

clean: ## Stop the private Engine and remove everything that was made
	@! command -v $(PYTHON) > /dev/null || $(PYTHON) scripts/images.py remove
	@! command -v $(PYTHON) > /dev/null || $(PYTHON) scripts/engine.py down
	rm -rf $(VENV) build dist .cache .hypothesis .mypy_cache .pytest_cache .ruff_cache *.egg-info
	rm -f ambassador/*.so $(LOOPS:.pyx=.c) certs/host-*.crt
	find . -name __pycache__ -prune -exec rm -rf {} +

$(AUDIT)/installed: pyproject.toml
	@echo "installing the audit's tools"
	@$(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/pip install -qq --disable-pip-version-check \
		$$($(PYTHON) -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb")); \
			print(*project["project"]["optional-dependencies"]["audit"])')
	@touch $@

# Without build isolation: the tools are in .venv anyway, and a rebuild then needs no network.
$(VENV)/installed: pyproject.toml setup.py
	@scripts/toolchain.sh $(PYTHON) compiler
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "installing the package and its development tools"
	@$(BIN)/pip install -qq --disable-pip-version-check 'setuptools>=77' 'cython>=3.1'
	@$(BIN)/pip install -qq --disable-pip-version-check --no-build-isolation -e '.[dev]'
	@touch $@

$(VENV)/built: $(VENV)/installed $(LOOP_SOURCES)
	@echo "compiling the relay loops"
	@$(BIN)/python setup.py -q build_ext --inplace
	@touch $@
