# The server `videollm-mod serve` in an image. docs/serving.md says how to build and run it.
#
#   docker build -t videollm-mod .                                               for a CPU
#   docker build -t videollm-mod:cuda --build-arg DEVICE=cuda .                  for an NVIDIA GPU
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
# Address of another index for PyTorch's wheels. Those of the default index bring CUDA and also run on a CPU.
ARG TORCH_INDEX=
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# PyTorch is the largest layer, and does not change with the code.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} "torch>=2.11" "torchvision>=0.26"
WORKDIR /source
COPY LICENSE README.md pyproject.toml *.py *.json *.jinja model.safetensors ./
COPY commands commands/
COPY convert convert/
COPY samples samples/
COPY serving serving/
COPY space space/
COPY train train/
# Versions are in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[serve]"

FROM python:${PYTHON}-slim
ARG DEVICE=cpu
# Triton compiles its kernels on the machine that runs them.
# hadolint ignore=DL3008
RUN if [ "${DEVICE}" != cpu ]; then \
        apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --create-home --uid 10001 server && install --directory --owner server /cache
COPY --from=build /opt/venv /opt/venv
# Malloc returns freed blocks of 1 MiB and more to the system, so memory grows less over hours: docs/reliability.md.
ENV PATH=/opt/venv/bin:$PATH HF_HOME=/cache/huggingface PYTHONUNBUFFERED=1 MALLOC_MMAP_THRESHOLD_=1048576
# By number, so that Kubernetes can tell that it is not root.
USER 10001
WORKDIR /home/server
# Downloaded checkpoints.
VOLUME /cache
EXPOSE 8000
# Loading a large checkpoint takes minutes.
HEALTHCHECK --interval=30s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["videollm-mod"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
