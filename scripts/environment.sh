# Sourced by the other scripts: makes .venv and installs ptqjax with the extras asked for; does nothing when done before.
# PTQJAX_PYTHON names the interpreter to use; otherwise the first one found that is Python 3.11 or later.

fail() {
    echo "error: $*" >&2
    exit 1
}

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in ${PTQJAX_PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
        if is_recent "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.11 or later was found; install one, or name it: PTQJAX_PYTHON=/path/to/python $0"
}

# environment EXTRAS: .venv with ptqjax (editable) and these extras. The stamp holds what was installed last.
environment() {
    local extras=$1 stamp=.venv/.ptqjax-installed python hash
    if [[ ! -x .venv/bin/python ]]; then
        python=$(find_python)
        echo "== making .venv with $("$python" --version)"
        "$python" -m venv .venv || fail "$python cannot make a virtual environment (Debian: apt install python3-venv)"
    fi
    is_recent .venv/bin/python || fail ".venv holds a Python before 3.11; remove it and call $0 again"
    hash=$(.venv/bin/python -c 'import hashlib; print(hashlib.sha256(open("pyproject.toml", "rb").read()).hexdigest())')
    case "$(cat "$stamp" 2>/dev/null || true)" in
        "$extras $hash") return ;;
        "dev $hash") if [[ $extras == cpu ]]; then return; fi ;; # dev contains cpu
    esac
    echo "== installing ptqjax[$extras] into .venv"
    rm -f "$stamp"
    # onnxruntime and onnxruntime-gpu own the same module: the other one must go first.
    if [[ $extras == cuda12 ]]; then unwanted=onnxruntime; else unwanted=onnxruntime-gpu; fi
    if .venv/bin/python -m pip show --quiet "$unwanted" >/dev/null 2>&1; then
        .venv/bin/python -m pip uninstall --quiet --yes onnxruntime onnxruntime-gpu
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extras]" </dev/null ||
        fail "pip could not install ptqjax[$extras]; its message stands above"
    echo "$extras $hash" >"$stamp"
}
