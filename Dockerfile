# ExplainServe in a container:   docker build -t explainserve .
#                                docker run -p 8001:8001 -p 8002:8002 -v "$PWD/models:/models:ro" explainserve
# VARIANT   cpu    ONNX models on onnxruntime (no torch in the image)
#           torch  cpu, and .pt2 and TorchScript models; pip's configuration decides which build of torch
#           gpu    ONNX models on onnxruntime-gpu, and torch (the image brings CUDA, not the driver); run with
#                  `--gpus all -e EXPLAINSERVE_DEVICE=cuda`
# BASE_IMAGE is any Debian-like image with Python 3.11 or newer and its venv module.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim

FROM ${BASE_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY clients/python clients/python
RUN python3 -m venv /build && /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM ${BASE_IMAGE} AS install
ARG VARIANT=cpu
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# The dependencies are a layer of their own, installed with an empty package, so that a change of sources does not
# install them again.
RUN python3 -m venv /explainserve \
 && mkdir -p service/explainserve clients/python/explainserve_client \
 && touch README.md LICENSE service/explainserve/__init__.py clients/python/explainserve_client/__init__.py \
 && case "$VARIANT" in \
      cpu|gpu) extras="$VARIANT,segmentation" ;; \
      torch) extras=cpu,torch,segmentation ;; \
      *) echo "VARIANT is cpu, torch or gpu, not '$VARIANT'" >&2; exit 1 ;; \
    esac \
 && /explainserve/bin/pip install --no-cache-dir --constraint constraints.txt ".[$extras]"
COPY --from=wheel /dist /dist
RUN /explainserve/bin/pip install --no-cache-dir --no-deps --force-reinstall /dist/*.whl \
 && /explainserve/bin/pip check

FROM ${BASE_IMAGE}
LABEL org.opencontainers.image.title="ExplainServe" \
      org.opencontainers.image.description="Serves raw feature attributions of compiled models over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 explainserve \
 && useradd --uid 10001 --gid 10001 --create-home explainserve \
 && mkdir /models
COPY --from=install /explainserve /explainserve
# onnxruntime's wheels send telemetry unless told otherwise before they are imported.
ENV PATH=/explainserve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ORT_DISABLE_TELEMETRY=1
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
VOLUME /models
EXPOSE 8001 8002
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
  CMD ["explainserve", "health", "--server", "127.0.0.1:8001"]
ENTRYPOINT ["explainserve"]
CMD ["serve", "--models", "/models", "--host", "0.0.0.0", "--port", "8001", "--http-port", "8002"]
