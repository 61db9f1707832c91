"""The image on every engine that Debian's packages give: see docs/engines.md."""
