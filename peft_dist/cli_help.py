"""How the command's help is arranged: the order of commands, and the options of ``serve`` by what they are about."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_ORDER = ("serve", "worker", "keys", "rolling-restart", "workload", "bench", "simulate", "tune", "version")

_PANELS = {
    "Model": """revision device dtype load_format trust_remote_code max_model_len served_model_name chat_template
        tool_call_parser generation_config""",
    "Adapters": """adapter adapter_dir pin_adapter max_loras adapter_device_memory adapter_host_memory
        adapter_load_timeout allow_hub_load allow_pickle""",
    "HTTP": """host port port_file ssl_certfile ssl_keyfile api_key admin_key cors_origin max_queue unread_timeout
        start_timeout shutdown_timeout log_level log_requests metrics_max_adapters""",
    "Merged or unmerged (docs/policies.md)": """policy exec_type policy_profile resident_models max_adapter_wait merge
        merged_minority decision_log cost_profile""",
    "Steps and KV cache": """max_num_seqs max_num_batched_tokens block_size num_blocks num_host_blocks preemption
        no_prefix_caching gpu_memory_utilization attention_backend threads depth enforce_eager no_fuse seed""",
    "Replicas (docs/orchestrator.md)": """replicas tensor_parallel_size migration migration_triggers handover_memory
        planner_limit kv_transfer restart heartbeat_timeout step_timeout state_dir orphan_timeout listen cluster_key""",
    "Ray (docs/cluster.md)": "cluster ray_address ray_cpus ray_gpus ray_placement_timeout",
}
PANEL_OF = {option: panel for panel, options in _PANELS.items() for option in options.split()}


class InOrder(TyperGroup):
    """Lists what is needed first before the rest."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all commands."""
        names = super().list_commands(ctx)
        return sorted(names, key=lambda name: _ORDER.index(name) if name in _ORDER else len(_ORDER))


class InPanels(TyperCommand):
    """``serve``, with a panel for each group of options; those without one stand under "Options"."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            panel = PANEL_OF.get(parameter.name or "")
            if panel is not None:
                # Only options and arguments of typer have this attribute, and all of ours are.
                parameter.rich_help_panel = panel  # type: ignore[attr-defined]


def show_version(is_asked: bool) -> None:
    """``--version``. Raises typer.Exit when it is there."""
    if is_asked:
        from peft_dist import __version__

        typer.echo(__version__)
        raise typer.Exit
