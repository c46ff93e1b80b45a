"""The registry: immutable versions of adapters on disk.

    ROOT/NAME/3/adapter_config.json, adapter_model.safetensors    as PEFT wrote or would write them
    ROOT/NAME/3/probes.json                                       what it said when it was trained: see `probes`
    ROOT/NAME/3/chat_template.jinja                               its chat template, where it is not the base's own
    ROOT/NAME/3/tenon.json                                        the Entry
    ROOT/NAME/last                                                the highest removed version: no number comes twice
    ROOT/NAME/aliases.json                                        names for versions: see `aliases`
    ROOT/NAME/lock                                                held while a version is added or removed

A version appears by one rename, whole; an alias is moved by one. This module does not know tensors, bases or runs.
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from pydantic import ValidationError

from tenon.errors import AdapterError
from tenon.registry.alias_book import AliasBook
from tenon.registry.aliases import Alias, Guard, Target, is_alias, new_target, read_aliases
from tenon.registry.contents import damaged, read_content
from tenon.registry.entry import Entry, EntryDraft
from tenon.registry.entry_files import (
    BESIDE,
    ENTRY_NAME,
    PEFT_FILES,
    TEMPLATE_NAME,
    make_entry,
    read_entry,
    require_file,
    require_nothing_else,
)
from tenon.registry.guards import require_as_good
from tenon.registry.lock import locked
from tenon.registry.peft_check import check_adapter
from tenon.registry.probes import PROBES_NAME, Probes
from tenon.runs.atomic import clean_leftovers, remove_folder, write_file_atomic, write_folder_atomic
from tenon.runs.space import require_space

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_VERSION = re.compile(r"[1-9]\d{0,8}")


class Registry:
    """The registered adapters under one folder, which is made when the first one comes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def register(
        self, name: str, files_folder: Path, draft: EntryDraft, *, beside: Mapping[str, bytes] | None = None
    ) -> Entry:
        """Check an adapter folder and keep a copy as the next version of `name`. Safe beside other processes.

        beside: contents of further files to keep with it, by names of `BESIDE`.
        Raises AdapterError adapter-bad-name and those of `check_adapter`; RunError run-disk-full.
        """
        assert set(beside or ()) <= BESIDE
        folder = self._adapter_folder(name)
        check_adapter(files_folder)
        folder.mkdir(parents=True, exist_ok=True)
        size_bytes = sum((files_folder / file).stat().st_size for file in PEFT_FILES)
        require_space(folder, size_bytes, f"registering {name}")
        with locked(folder):
            clean_leftovers(folder)
            version = self._next_version(folder)
            made: list[Entry] = []

            def write(aside: Path) -> None:
                for file in PEFT_FILES:
                    shutil.copyfile(files_folder / file, aside / file)
                for file, content in (beside or {}).items():
                    (aside / file).write_bytes(content)
                # Checked again: what counts is what was copied, not what lay there a moment ago.
                made.append(make_entry(name, version, aside, check_adapter(aside), draft, tuple(beside or ())))
                (aside / ENTRY_NAME).write_text(made[0].to_json())

            write_folder_atomic(folder / str(version), write, need_bytes=size_bytes)
        return made[0]

    def import_peft(self, folder: Path, name: str, *, base_spec: str, base_hash: str) -> Entry:
        """Register an adapter that was made elsewhere: of its lineage only the base is known, and that by say-so."""
        return self.register(name, folder, EntryDraft(base_spec=base_spec, base_hash=base_hash))

    def get(self, spec: str) -> Entry:
        """The entry of `NAME` (its newest version), `NAME@VERSION`, or `NAME@ALIAS` (of several the main version).

        Raises AdapterError adapter-bad-name, adapter-unknown (with the nearest name), adapter-damaged.
        """
        name, version = self._resolve(spec)
        return read_entry(self.root / name / str(version))

    def folder(self, entry: Entry) -> Path:
        """Where the files of an entry lie; read them, never write there."""
        return self._adapter_folder(entry.name) / str(entry.version)

    def list(self, *, on_damaged: Callable[[AdapterError], None] | None = None) -> tuple[Entry, ...]:
        """Every version of every adapter, by name and version.

        on_damaged: told each entry that cannot be read, which is then left out; without it AdapterError adapter-damaged
        is raised for the first.
        """
        entries = []
        for label in self.labels():
            try:
                entries.append(self.get(label))
            except AdapterError as error:
                if on_damaged is None:
                    raise
                on_damaged(error)
        return tuple(entries)

    def labels(self) -> tuple[str, ...]:
        """NAME@VERSION of everything that is there, readable or not."""
        return tuple(f"{name}@{version}" for name in self.names() for version in self.versions(name))

    def names(self) -> tuple[str, ...]:
        """Names that have at least one version."""
        if not self.root.is_dir():
            return ()
        found = sorted(place.name for place in self.root.iterdir() if _NAME.fullmatch(place.name))
        return tuple(name for name in found if self.versions(name))

    def versions(self, name: str) -> tuple[int, ...]:
        """Versions of `name`, ascending; none for a name that was never registered."""
        folder = self._adapter_folder(name)
        if folder.is_symlink() or not folder.is_dir():
            return ()
        found = [place for place in folder.iterdir() if _VERSION.fullmatch(place.name)]
        return tuple(sorted(int(place.name) for place in found if place.is_dir() and not place.is_symlink()))

    def aliases(self, name: str) -> dict[str, Alias]:
        """The aliases of an adapter. Raises AdapterError adapter-bad-name, adapter-damaged."""
        return read_aliases(self._adapter_folder(name))

    def alias(self, spec: str) -> Alias:
        """The alias `NAME@ALIAS`. Raises AdapterError adapter-alias-unknown, adapter-bad-alias, adapter-unknown."""
        book, alias = self._book(spec)
        return book.get(alias)

    def target(self, spec: str) -> Target:
        """What a request for `NAME`, `NAME@VERSION` or `NAME@ALIAS` may go to.

        Raises AdapterError adapter-bad-name, adapter-unknown, adapter-damaged.
        """
        name, _, after = spec.partition("@")
        found = self.aliases(name).get(after) if is_alias(after) else None
        return found.target if found is not None else Target(shares={self._resolve(spec)[1]: 1.0})

    def set_alias(
        self,
        spec: str,
        shares: Mapping[int, float],
        shadow: int | None = None,
        *,
        sticky: bool = False,
        force: bool = False,
        tag: str | None = None,
    ) -> Alias:
        """Let `NAME@ALIAS` stand for versions that exist, from this instant on. sticky: see `Target`.

        force: also for versions that its guard's metric would keep out. tag: of the alias as it has to be still
        (`Alias.tag`, or ABSENT).
        Raises AdapterError adapter-bad-alias, adapter-unknown, adapter-guard, adapter-alias-moved.
        """
        book, alias = self._book(spec)

        def allow(known: Alias, target: Target) -> None:
            if known.guard is not None and not force:
                old = self.get(f"{book.name}@{known.target.main}")
                for version in sorted(target.shares.keys() - known.target.shares.keys()):
                    require_as_good(spec, known.guard, self.get(f"{book.name}@{version}"), old)

        return book.move(alias, new_target(shares, shadow, sticky=sticky), allow=allow, tag=tag)

    def guard_alias(self, spec: str, guard: Guard | None) -> Alias:
        """Set or take away the guard of `NAME@ALIAS`. Raises AdapterError adapter-alias-unknown."""
        book, alias = self._book(spec)
        return book.guard(alias, guard)

    def roll_back(self, spec: str, *, tag: str | None = None) -> Alias:
        """Let `NAME@ALIAS` stand for what it stood for before. tag: as of `set_alias`.

        Raises AdapterError adapter-alias-unknown, adapter-no-way-back; adapter-unknown for a version removed since.
        """
        book, alias = self._book(spec)
        moved = book.roll_back(alias, "asked for", tag=tag)
        assert moved is not None
        return moved

    def roll_back_from(self, spec: str, expected: Target, reason: str) -> Alias | None:
        """Roll `NAME@ALIAS` back if it still stands for what is expected; else None: somebody was faster.

        Raises as `roll_back`.
        """
        book, alias = self._book(spec)
        return book.roll_back(alias, reason, expected=expected)

    def remove_alias(self, spec: str, *, tag: str | None = None) -> None:
        """Forget `NAME@ALIAS`. tag: as of `set_alias`. Raises AdapterError adapter-alias-unknown."""
        book, alias = self._book(spec)
        book.forget(alias, tag=tag)

    def verify(self, spec: str) -> Entry:
        """Hash every file again and check the adapter as if it came today.

        Raises AdapterError adapter-damaged, which says what is wrong, and those of `check_adapter`.
        """
        entry = self.get(spec)
        folder = self.folder(entry)
        require_nothing_else(folder, entry)
        for name, facts in (entry.files | entry.beside).items():
            require_file(folder, name, facts)
        check_adapter(folder)
        return entry

    def read(self, spec: str) -> tuple[Entry, dict[str, bytearray]]:
        """The entry, and what its PEFT files hold: each is read once, so what is given is what was registered, whatever
        becomes of the files meanwhile. Not checked any further. Raises AdapterError adapter-damaged, adapter-too-large.
        """
        entry = self.get(spec)
        folder = self.folder(entry)
        require_nothing_else(folder, entry)
        return entry, {name: read_content(folder, name, facts) for name, facts in entry.files.items()}

    def probes(self, entry: Entry) -> Probes | None:
        """What the adapter said when it was trained; None where nothing was recorded (the recipe did not want it, or
        it was made elsewhere). Raises AdapterError adapter-damaged.
        """
        content = self.beside(entry, PROBES_NAME)
        try:
            return None if content is None else Probes.from_json(content)
        except ValidationError as error:
            raise damaged(self.folder(entry), f"{PROBES_NAME} holds no probes of this version of Tenon") from error

    def template(self, entry: Entry) -> str | None:
        """The source of the adapter's own chat template; None where it was trained with the base's.

        Raises AdapterError adapter-damaged.
        """
        content = self.beside(entry, TEMPLATE_NAME)
        try:
            return None if content is None else content.decode()
        except UnicodeDecodeError as error:
            raise damaged(self.folder(entry), f"{TEMPLATE_NAME} is no text") from error

    def beside(self, entry: Entry, name: str) -> bytes | None:
        """What a file beside the adapter's holds, as it was registered; None where the version has no such file.

        Raises AdapterError adapter-damaged.
        """
        facts = entry.beside.get(name)
        if facts is None:
            return None
        folder = self.folder(entry)
        require_file(folder, name, facts)
        return (folder / name).read_bytes()

    def export(self, spec: str, target: Path) -> Entry:
        """Write what PEFT and vLLM load, and its own chat template if any, into a new folder, after verifying it.

        Raises AdapterError adapter-export-not-empty and those of `verify`; RunError run-disk-full.
        """
        entry = self.verify(spec)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise AdapterError(
                "adapter-export-not-empty", f"{target}: the place is taken", hint="give a folder that does not exist"
            )
        source = self.folder(entry)
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        require_space(target, entry.size_bytes, f"exporting {entry.label}")

        def write(aside: Path) -> None:
            # Not the probes: rows of the data stay in the registry.
            for name in (*PEFT_FILES, *({TEMPLATE_NAME} & entry.beside.keys())):
                shutil.copyfile(source / name, aside / name)

        write_folder_atomic(target.absolute(), write, replace=True, need_bytes=entry.size_bytes)
        return entry

    def remove(self, spec: str) -> str:
        """Remove one version for good, even a damaged one, and return its label; its number is not given again.

        `NAME` alone means its newest version. Raises AdapterError adapter-unknown, adapter-in-use.
        """
        name, version = self._resolve(spec)
        folder = self._adapter_folder(name)
        with locked(folder):
            self._require_no_alias(name, version)
            last = max(version, _last(folder))
            write_file_atomic(folder / "last", str(last).encode())
            remove_folder(folder / str(version))
        return f"{name}@{version}"

    def _resolve(self, spec: str) -> tuple[str, int]:
        """The name and the version, one that exists, of `NAME` or `NAME@VERSION`."""
        name, _, version = spec.partition("@")
        versions = self.versions(name)
        if not versions:
            near = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise AdapterError(
                "adapter-unknown", f"no adapter is registered as {name!r}", hint=f"{hint}see them: tenon adapters list"
            )
        if is_alias(version) and version in (aliases := self.aliases(name)):
            version = str(aliases[version].target.main)
        if "@" in spec and (not _VERSION.fullmatch(version) or int(version) not in versions):
            raise AdapterError(
                "adapter-unknown",
                f"{name} has no version {version!r}",
                got=f"versions {', '.join(map(str, versions))}",
                hint=f"leave the version out for the newest, {name}@{versions[-1]}",
            )
        return name, int(version) if version else versions[-1]

    def _book(self, spec: str) -> tuple[AliasBook, str]:
        """The aliases of a name that exists, and the alias of `NAME@ALIAS`."""
        name, _, alias = spec.partition("@")
        if not is_alias(alias):
            raise AdapterError(
                "adapter-bad-alias",
                "an alias is written NAME@ALIAS; it has letters, digits, _ - and begins with a letter or _",
                got=repr(spec[:120]),
                hint="for example support-bot@prod",
            )
        self._resolve(name)

        def require(version: int) -> None:
            self._resolve(f"{name}@{version}")

        return AliasBook(name, self._adapter_folder(name), require), alias

    def _require_no_alias(self, name: str, version: int) -> None:
        users = sorted(alias for alias, kept in self.aliases(name).items() if version in kept.target.versions)
        if users:
            raise AdapterError(
                "adapter-in-use",
                f"{name}@{version} cannot be removed: {', '.join(f'{name}@{alias}' for alias in users)} stands for it",
                hint=f"move the alias first: tenon adapters alias {name}@{users[0]} VERSION",
            )

    def _adapter_folder(self, name: str) -> Path:
        if _NAME.fullmatch(name) is None:
            raise AdapterError(
                "adapter-bad-name",
                "an adapter's name has letters, digits, . _ - and begins with a letter, a digit or _",
                got=repr(name[:80]),
                hint="choose another name",
            )
        return self.root / name

    def _next_version(self, folder: Path) -> int:
        return max(_last(folder), *self.versions(folder.name), 0) + 1


def _last(folder: Path) -> int:
    """The highest version that was ever removed, 0 if none was."""
    last = folder / "last"
    text = last.read_text() if last.is_file() else ""
    return int(text) if _VERSION.fullmatch(text) else 0
