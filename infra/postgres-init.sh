#!/bin/sh
# Run once by the PostgreSQL image, on an empty volume: the registry's second role, and Prefect's own database.
# lora owns the registry's tables and makes them (`lora setup`); lora_app works with them, owns nothing, and so cannot
# lift the row-level security that keeps tenants apart.
set -eu
psql --set=ON_ERROR_STOP=1 --username="$POSTGRES_USER" --dbname="$POSTGRES_DB" --set=password="$POSTGRES_PASSWORD" <<'SQL'
CREATE DATABASE prefect OWNER lora;
CREATE ROLE lora_app LOGIN PASSWORD :'password';
SQL
