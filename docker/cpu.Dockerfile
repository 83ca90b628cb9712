# The README's commands in a slim, non-root image:
#   docker build -f docker/cpu.Dockerfile -t hawq-tvm .
#   docker run --rm hawq-tvm --help
#   docker run --rm -v "$PWD:/data" hawq-tvm compile /data/model.onnx -o /data/model.hawq
FROM python:3.11.10-slim-bookworm

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ make \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 1000 hawq

WORKDIR /home/hawq/hawq_tvm
COPY --chown=hawq:hawq . .
USER hawq
# The same script that `make demo` and `make test` use; the extra "torch" is left to those who want the demo.
RUN bash deploy/environment.sh .venv bench

ENV PATH="/home/hawq/hawq_tvm/.venv/bin:$PATH"
ENTRYPOINT ["hawq-tvm"]
CMD ["--help"]
