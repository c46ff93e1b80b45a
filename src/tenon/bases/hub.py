"""Fetch a base from the Hugging Face hub: the only place that talks to it, and where its exceptions become ours.

This module does not look into what it fetched.
"""

from __future__ import annotations

from pathlib import Path

from tenon.errors import BaseModelError

# What a base needs; pickles, other frameworks' weights and images stay where they are.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def fetch_snapshot(repo_id: str, *, offline: bool) -> Path:
    """Download what is missing of a hub base, or take the hub's local cache when offline; returns its folder.

    Raises: BaseModelError base-hub-missing (no such base, or no right to read it), base-offline (not in the cache and
    the hub is out of reach), base-hub (anything else the hub answers).
    """
    try:
        import huggingface_hub  # slow to import, and absent from the light install
        from huggingface_hub.errors import (
            HFValidationError,
            HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # of whichever client it uses
        )
    except ImportError as error:
        raise BaseModelError(
            "base-hub",
            f"{repo_id} is not a path here, and the package that asks the hub is not installed",
            got=str(error),
            hint="pip install 'tenonlm[train]'",
        ) from error

    try:
        folder = huggingface_hub.snapshot_download(repo_id, allow_patterns=list(PATTERNS), local_files_only=offline)
    except (HTTPError, HFValidationError, OSError) as error:
        raise explain_hub_error(error, repo_id, offline=offline) from error
    return Path(folder)


def explain_hub_error(error: Exception, repo_id: str, *, offline: bool) -> BaseModelError:
    """Our error for one that huggingface_hub raised."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    reason = type(error).__name__
    if isinstance(error, GatedRepoError):
        return BaseModelError(
            "base-hub-missing",
            f"the hub asks for an agreement before it gives out {repo_id}",
            got=reason,
            hint=f"accept the terms at https://huggingface.co/{repo_id}, then: hf auth login",
        )
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return BaseModelError(
            "base-hub-missing",
            f"{repo_id} is neither a path here nor a base on the hub that you may read",
            got=reason,
            hint="check the spelling, or give a folder or a .gguf file; for a private base: hf auth login",
        )
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
        why = "TENON_OFFLINE or HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        return BaseModelError(
            "base-offline",
            f"{repo_id} is neither a path here nor in the hub's local cache, and {why}",
            got=reason,
            hint="give a local folder, a .gguf file or an embedded base (smollm2-135m), or go online once",
        )
    return BaseModelError(
        "base-hub",
        f"the hub did not give out {repo_id}",
        got=f"{reason}: {str(error).splitlines()[0][:200] if str(error) else ''}",
        hint="try again, or download the folder yourself and give its path",
    )
