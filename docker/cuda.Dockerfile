# The compiler with nvcc and the runtime for NVIDIA's GPUs, two images of users without privileges:
#   docker build -f docker/cuda.Dockerfile --target compiler -t hawq-tvm-cuda .
#   docker build -f docker/cuda.Dockerfile --target runtime -t hawq-run-cuda .
# docker/README.md shows how to use them. The driver is the host's (docker run --gpus all); compiling needs no GPU.
FROM nvidia/cuda:13.0.0-base-ubuntu24.04 AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Ubuntu's mirrors keep no old versions that could be named.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 2000 hawq
WORKDIR /home/hawq

FROM nvidia/cuda:13.0.0-devel-ubuntu24.04 AS compiler
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends cmake g++ make python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 2000 hawq
WORKDIR /home/hawq/hawq_tvm
RUN chown hawq:hawq .
COPY --chown=hawq:hawq . .
USER 2000
ARG EXTRA=cuda,sign
RUN bash deploy/environment.sh .venv "$EXTRA"
ENV PATH="/home/hawq/hawq_tvm/.venv/bin:$PATH"
ENTRYPOINT ["hawq-tvm"]
CMD ["--help"]

FROM compiler AS built
RUN bash deploy/environment.sh /home/hawq/runtime runtime \
 && bash deploy/runner/build.sh /home/hawq/runtime/bin/python /tmp/build \
 && cp /tmp/build/hawq-run /home/hawq/runtime/bin

FROM base AS runtime
COPY --from=built --chown=hawq:hawq /home/hawq/runtime /home/hawq/runtime
USER 2000
ENV PATH="/home/hawq/runtime/bin:$PATH"
ENTRYPOINT ["hawq-run"]
CMD ["--help"]
