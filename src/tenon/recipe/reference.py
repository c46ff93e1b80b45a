"""docs/recipe.md, made from the schema, the defaults and the tables of other tools' keys.

A test holds the file equal to what this module writes. Knows no files.
"""

from __future__ import annotations

from tenon.recipe.aliases import ALIASES, ALWAYS, DIFFERENT
from tenon.recipe.applies import RULES
from tenon.recipe.defaults import DEFAULTS, DERIVED
from tenon.recipe.fields import LeafField, leaf_fields, section_names, source_fields
from tenon.recipe.schema import Recipe, Section

_HEAD = """# The recipe

A recipe is a YAML file that says what an adapter learns from, on which base, and how. Only `base` and `data.train` have
to be said. Everything else has a default, or is derived from the base, the machine and the data;
`tenon recipe explain my.yaml` prints every value with where it came from and why, and `tenon plan my.yaml` what it will
cost.

```yaml
base: smollm2-135m
data:
  train: rows.jsonl
```

- A section's keys stand below it, indented; `lora.rank: 8` on one line means the same. A key may be written once.
- Any key can be set on the command line: `tenon train my.yaml lora.rank=32 data.max_tokens=512`. The command line wins
  over the file. Lists are written in brackets: `"lora.targets=[q_proj, v_proj]"`. `lora.rank=null` gives a value back
  to the planner.
- Relative paths start at the folder of the recipe file, on the command line too.
- A key that does not exist, or does not apply to this run, is an error with the nearest name or the reason.
- `2e-4` is a number, `"16"` in quotes is text.
"""

_FOREIGN_HEAD = """## Keys of other tools

Keys of axolotl, LLaMA-Factory, TRL and PEFT that mean exactly the same are understood at the top of a recipe and on the
command line; the plan prints our name for them. A value that has no exact equal is refused, with the difference.
What becomes of rows longer than `data.max_tokens` is `data.on_long`, whatever the other tool does.
"""
_PAIRS = (
    ("`per_device_train_batch_size` x `gradient_accumulation_steps`", "LLaMA-Factory, TRL", "`batch.rows`"),
    ("`micro_batch_size` x `gradient_accumulation_steps`", "axolotl", "`batch.rows`"),
    ("`bf16`, `fp16`", "axolotl, LLaMA-Factory, TRL", "`precision.compute`"),
    ("`adapter: qlora`, with or without `load_in_4bit: true`", "axolotl", "`precision.base: nf4`"),
    ("`load_in_4bit: true` with `use_bnb_nested_quant: true`", "TRL", "`precision.base: nf4`"),
    ("`quantization_bit: 4`", "LLaMA-Factory", "`precision.base: nf4`"),
    ("`load_in_4bit: false`, `load_in_8bit: false`", "axolotl, TRL", "`precision.base: same`"),
)


def recipe_reference() -> str:
    """The whole of docs/recipe.md."""
    sections = [_HEAD, _fields_text(), _clashes_text(), _aliases_text()]
    return "\n".join(sections)


def _fields_text() -> str:
    leaves = leaf_fields()
    parts = ["## The run\n", _field_table([leaf for leaf in leaves if "." not in leaf.key])]
    for name in section_names():
        own = [leaf for leaf in leaves if leaf.key.startswith(f"{name}.")]
        parts += [f"\n## {name}\n", f"{_section_doc(name)}\n", _field_table(own)]
        if name == "data":
            parts += ["\nOne source of rows:\n", _source_table()]
    return "\n".join(parts) + "\n"


def _section_doc(name: str) -> str:
    section = Recipe.model_fields[name].annotation
    if not (isinstance(section, type) and issubclass(section, Section)):
        raise TypeError(f"{name} is no section")
    return " ".join((section.__doc__ or "").split())


def _field_table(leaves: list[LeafField]) -> str:
    rows = [f"| `{leaf.key}` | {_cell(leaf.kind)} | {_default(leaf)} | {_cell(leaf.description)} |" for leaf in leaves]
    return "\n".join(["| key | value | left out | meaning |", "|---|---|---|---|", *rows])


def _source_table() -> str:
    rows = [f"| `{leaf.key}` | {_cell(leaf.kind)} | {_cell(leaf.description)} |" for leaf in source_fields()]
    return "\n".join(["| key | value | meaning |", "|---|---|---|", *rows])


def _default(leaf: LeafField) -> str:
    if leaf.required:
        return "must be said"
    if leaf.key in DERIVED:
        return _cell(DERIVED[leaf.key])
    default = DEFAULTS[leaf.key]
    if default.shown:
        return f"{_cell(default.shown)}: {_cell(default.reason)}"
    if default.value is None or default.value == ():
        return _cell(default.reason)
    shown = str(default.value).lower() if isinstance(default.value, bool) else f"{default.value}"
    return f"`{shown}`: {_cell(default.reason)}"


def _clashes_text() -> str:
    rows = [f"| `{rule.key}` | {_cell(rule.why)} | {_cell(rule.hint)} |" for rule in RULES]
    head = [
        "## When a key is refused\n",
        "These keys do not apply in every run. There they are errors, never ignored.\n",
    ]
    return "\n".join([*head, "| key | refused when | what to do |", "|---|---|---|", *rows]) + "\n"


def _aliases_text() -> str:
    understood = [f"| `{alias.key}` | {', '.join(alias.tools)} | `{alias.canonical}` |" for alias in ALIASES]
    pairs = [f"| {key} | {tools} | {ours} |" for key, tools, ours in _PAIRS]
    always = [
        f"| `{key}` | `{str(value).lower() if value in (True, False) else value}` |" for key, value in ALWAYS.items()
    ]
    different = [f"| `{key}` | {_cell(why)} |" for key, why in DIFFERENT.items()]
    return "\n".join(
        [
            _FOREIGN_HEAD,
            "| key | of | is here |",
            "|---|---|---|",
            *understood,
            *pairs,
            "\nThese say what Tenon does anyway; they are accepted with this value alone.\n",
            "| key | value |",
            "|---|---|",
            *always,
            "\nThese look alike and are not the same; they are refused.\n",
            "| key | the difference |",
            "|---|---|",
            *different,
            "",
        ]
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
