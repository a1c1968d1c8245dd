"""MLflow's side of `registry_vs_mlflow.py`: run by MLflow's interpreter, it answers on stdout what stdin asks.

    python mlflow_side.py DATABASE-URL MODELS

It makes one model by MLflow's own API and copies its rows for the others, then takes lists of models' numbers, a line
of JSON each, and answers with the seconds of each lookup.
"""

import json
import sys
import time

import mlflow
from mlflow import MlflowClient
from sqlalchemy import create_engine, text

COPIES = """
INSERT INTO registered_models (name, creation_time, last_updated_time, description{workspace})
  SELECT 'user-' || n, creation_time, last_updated_time, description{workspace}
  FROM registered_models, generate_series(2, :models) n WHERE name = 'user-1';
INSERT INTO model_versions ({columns}) SELECT {values} FROM model_versions, generate_series(2, :models) n
  WHERE name = 'user-1';
INSERT INTO registered_model_aliases (alias, version, name{workspace}) SELECT alias, version, 'user-' || n{workspace}
  FROM registered_model_aliases, generate_series(2, :models) n WHERE name = 'user-1'
"""


def furnished(url: str, models: int) -> MlflowClient:
    """A client of a registry with that many models, each with one version and the alias `latest-good`."""
    client = MlflowClient(registry_uri=url, tracking_uri=url)
    client.create_registered_model("user-1")
    client.create_model_version("user-1", "s3://adapters/t/acme/u/1/default/default-1")
    client.set_registered_model_alias("user-1", "latest-good", "1")
    with create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
        names = [
            name
            for (name,) in connection.execute(
                text("SELECT column_name FROM information_schema.columns WHERE table_name = 'model_versions'")
            )
        ]
        values = ["'user-' || n" if name == "name" else name for name in names]
        workspace = ", workspace" if "workspace" in names else ""
        code = COPIES.format(columns=", ".join(names), values=", ".join(values), workspace=workspace)
        for statement in code.split(";\n"):
            connection.execute(text(statement), {"models": models})
        connection.execute(text("VACUUM ANALYZE"))
    return client


def main() -> None:
    """Answer until there is nothing more to read."""
    url, models = sys.argv[1], int(sys.argv[2])
    client = furnished(url, models)
    sys.stdout.write(json.dumps({"version": mlflow.__version__}) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        seconds = []
        for number in json.loads(line):
            start = time.perf_counter()
            client.get_model_version_by_alias(f"user-{number}", "latest-good")
            seconds.append(time.perf_counter() - start)
        sys.stdout.write(json.dumps({"seconds": seconds}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
