-- Prefect's own database beside the registry's; run once, on an empty volume.
CREATE DATABASE prefect OWNER lora;
