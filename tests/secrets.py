"""Keys that tests plant, to look for them in all that a run leaves."""

from __future__ import annotations

PLANTED = {
    "WANDB_API_KEY": "f00d" * 10,
    "HF_TOKEN": "hf_plantedPlantedPlantedPlantedPlanted",
    "AWS_SECRET_ACCESS_KEY": "planted/aws+secret/access+key/0123456789",
    "RAY_AUTH_TOKEN": "plantedraytoken0123456789abcdef0123456789",
}
URLS = {
    "s3://AKIAPLANTED:planted/url+key@bucket/adapters": "planted/url+key",
    "https://me:planted-url-password@models.example/base": "planted-url-password",
    "https://store.example/base?X-Amz-Signature=planted-signature&part=1": "planted-signature",
}
"""Values of a config, and what of them is secret."""
