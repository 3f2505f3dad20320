#!/usr/bin/env bash
# The parity tests under other releases of transformers, and the ZeRO-3 test with DeepSpeed:
#
#     tests/hf/parity_versions.sh 5.0.0 5.17.0 > tests/hf/parity.txt
#
# Each gets a scratch environment that lies over .venv (`make test` makes that one): what is installed into it hides what .venv has,
# so torch is not installed again. The last lines of every run are printed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu PIP_DISABLE_PIP_VERSION_CHECK=1
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

overlay() { # overlay NAME REQUIREMENT...: an environment over .venv with these packages; sets $python
    local folder=$scratch/$1 site
    shift
    .venv/bin/python -m venv --without-pip "$folder"
    python=$folder/bin/python
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    .venv/bin/python -m pip --python "$python" install --quiet --ignore-installed --target "$site" "$@" >&2
    echo "$base" >"$site/base.pth" # after the installation, which would otherwise count .venv's packages as its own
}

report() { # report TEST...
    "$python" -c 'import platform, accelerate, peft, torch, transformers
print("python", platform.python_version(), *(f"{m.__name__} {m.__version__}" for m in (torch, transformers, accelerate, peft)))'
    { nice "$python" -m pytest -q -p no:cacheprovider -W ignore "$@" || true; } |
        grep -E '^(SKIPPED|FAILED|ERROR)|passed|failed' | sed -E 's/ in [0-9.:]+s.*//'
    echo
}

python=.venv/bin/python
report tests/hf tests/examples
for version in "${@:?which releases of transformers, as in: $0 5.0.0 5.17.0}"; do
    overlay "transformers-$version" "transformers==$version"
    report tests/hf tests/examples
done
# DeepSpeed without its dependencies, of which .venv has most: torch is one, and must stay the one of .venv
overlay deepspeed einops hjson msgpack ninja py-cpuinfo
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
DS_BUILD_OPS=0 .venv/bin/python -m pip --python "$python" install --quiet --no-deps --no-build-isolation --target "$site" deepspeed >&2
"$python" -c 'import importlib.metadata as m; print("deepspeed", m.version("deepspeed"))'
report tests/distributed/test_zero3.py tests/training/test_processes.py
