"""Which base, data, metrics, owner and deployments belong to every adapter version, and what may go out.

Imports no torch: adapters are files and records here, never tensors.
"""

from luthier.core.lazy import lazy_names

__getattr__, __all__ = lazy_names(
    __name__,
    {
        "Registry": "luthier.registry.place",
        "add_surface": "luthier.registry.surfaces",
        "add_tenant": "luthier.registry.tenants",
        "approve": "luthier.registry.surfaces",
        "hold": "luthier.registry.surfaces",
        "in_production": "luthier.registry.production",
        "issue_key": "luthier.registry.tenants",
        "migrate": "luthier.registry.migrations",
        "open_registry": "luthier.registry.place",
        "promote": "luthier.registry.promotion",
        "read_view": "luthier.registry.view",
        "record_eval": "luthier.registry.decisions",
        "record_gate": "luthier.registry.decisions",
        "record_usage": "luthier.registry.usage",
        "release": "luthier.registry.surfaces",
        "retire": "luthier.registry.retirement",
        "rollback": "luthier.registry.promotion",
        "route": "luthier.registry.experiments",
        "start_experiment": "luthier.registry.experiments",
        "stop_experiment": "luthier.registry.experiments",
        "undeploy": "luthier.registry.retirement",
    },
)
