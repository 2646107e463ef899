#!/usr/bin/env bash
# Triton Inference Server 2.51.0 (as in nvidia-pytriton 0.7.0), HTTP: a request may name
# the outputs that it wants, and one expects them in that order, or in the order of
# config.pbtxt. A model's answer keeps the order of the request. An ensemble's answer comes
# in an order of its own, whatever was asked. It also carries sequence_id, sequence_start
# and sequence_end, though no sequence was begun. So take outputs by name.
#
# Seen, outputs declared and asked as WORD, AGE, MIDDLE:
#   the model: WORD, AGE, MIDDLE      the ensemble of that one model: MIDDLE, AGE, WORD
#
# Linux on x86-64 with glibc 2.35 and the shared library of Python 3.11.
# Exit status 0: as stated. 1: it changed. PYTHON names a Python 3.11.
set -euo pipefail
work=$(mktemp -d)
server=
cleanup() {
  if [ -n "$server" ]; then
    kill "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
  fi
  rm -rf "$work"
}
trap cleanup EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
pip numpy==1.26.4
pip --no-deps nvidia-pytriton==0.7.0

mkdir -p "$work/models/pair/1" "$work/models/both/1"
cat > "$work/models/pair/config.pbtxt" <<'CONFIG'
backend: "python"
max_batch_size: 0
input [ { name: "X" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [
  { name: "WORD" data_type: TYPE_FP32 dims: [ 1 ] },
  { name: "AGE" data_type: TYPE_FP32 dims: [ 1 ] },
  { name: "MIDDLE" data_type: TYPE_FP32 dims: [ 1 ] }
]
instance_group [ { kind: KIND_CPU } ]
CONFIG
cat > "$work/models/pair/1/model.py" <<'MODEL'
import triton_python_backend_utils as pb


class TritonPythonModel:
    def execute(self, requests):
        answers = []
        for request in requests:
            x = pb.get_input_tensor_by_name(request, "X").as_numpy()
            names = ("WORD", "AGE", "MIDDLE")
            outputs = [pb.Tensor(name, x + 1) for name in names]
            answers.append(pb.InferenceResponse(outputs))
        return answers
MODEL
cat > "$work/models/both/config.pbtxt" <<'CONFIG'
platform: "ensemble"
max_batch_size: 0
input [ { name: "X" data_type: TYPE_FP32 dims: [ 1 ] } ]
output [
  { name: "WORD" data_type: TYPE_FP32 dims: [ 1 ] },
  { name: "AGE" data_type: TYPE_FP32 dims: [ 1 ] },
  { name: "MIDDLE" data_type: TYPE_FP32 dims: [ 1 ] }
]
ensemble_scheduling {
  step [
    {
      model_name: "pair"
      model_version: -1
      input_map { key: "X" value: "X" }
      output_map { key: "WORD" value: "WORD" }
      output_map { key: "AGE" value: "AGE" }
      output_map { key: "MIDDLE" value: "MIDDLE" }
    }
  ]
}
CONFIG

site=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")
libdir=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))")
home="$site/pytriton/tritonserver"
cp -r "$home/backends" "$work/backends"
cp "$home/python_backend_stubs/3.11/triton_python_backend_stub" "$work/backends/python/"
port=$("$work/venv/bin/python" -c "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); print(s.getsockname()[1])")
LD_LIBRARY_PATH="$site/nvidia_pytriton.libs:$libdir" PATH="$work/venv/bin:$PATH" \
  PYTHONPATH="$site" CUDA_VISIBLE_DEVICES="" "$home/bin/tritonserver" \
  --model-repository="$work/models" --backend-directory="$work/backends" \
  --cache-directory="$home/caches" --http-address=127.0.0.1 --http-port="$port" \
  --allow-metrics=false --allow-grpc=false --exit-timeout-secs=2 \
  > "$work/log" 2>&1 &
server=$!

"$work/venv/bin/python" - "$port" <<'PYTHON'
import json
import sys
import time
import urllib.error
import urllib.request

url = f"http://127.0.0.1:{sys.argv[1]}/v2"
for _ in range(300):
    try:
        urllib.request.urlopen(f"{url}/health/ready", timeout=2)
        break
    except (urllib.error.URLError, OSError):
        time.sleep(0.2)
version = json.load(urllib.request.urlopen(url))["version"]
print("Triton Inference Server", version)
body = {
    "inputs": [{"name": "X", "shape": [1], "datatype": "FP32", "data": [1.0]}],
    "outputs": [{"name": name} for name in ("WORD", "AGE", "MIDDLE")],
}
order = {}
for model in ("pair", "both"):
    data = json.dumps(body).encode()
    answer = json.load(urllib.request.urlopen(f"{url}/models/{model}/infer", data))
    order[model] = [output["name"] for output in answer["outputs"]]
    print(f"{model}: {order[model]}, parameters {answer.get('parameters')}")
as_stated = order["pair"] == ["WORD", "AGE", "MIDDLE"]
as_stated &= order["both"] == ["MIDDLE", "AGE", "WORD"]
sys.exit(0 if as_stated else 1)
PYTHON
