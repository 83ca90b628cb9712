# The compiler and the runtime for CPUs, two slim images of users without privileges:
#   docker build -f docker/cpu.Dockerfile --target compiler -t hawq-tvm .
#   docker build -f docker/cpu.Dockerfile --target runtime -t hawq-run .
# docker/README.md shows how to use them. The steps are the scripts that the tests run.
FROM python:3.11.10-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN useradd --create-home --uid 1000 hawq
WORKDIR /home/hawq

FROM base AS compiler
# TVM links libraries with g++; Debian's mirrors keep no old versions that could be named.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends cmake g++ make \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /home/hawq/hawq_tvm
RUN chown hawq:hawq .
COPY --chown=hawq:hawq . .
USER 1000
# The extras to install beside the compiler: "bench" to time it beside other runtimes, "test" to run the tests.
ARG EXTRA=sign
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
USER 1000
ENV PATH="/home/hawq/runtime/bin:$PATH"
ENTRYPOINT ["hawq-run"]
CMD ["--help"]
