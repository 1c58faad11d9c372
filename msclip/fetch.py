"""The files of a model on local disk, wherever they are kept."""

import fnmatch
from pathlib import Path

from msclip.convert.recognise import FOLDER_FILES
from msclip.errors import UserError
from msclip.storage import Folder

MODEL_ENDINGS = (".safetensors", ".pt", ".pth", ".bin")


def local_copy(path: str, scratch: Path) -> Path:
    """A local file, or a local folder with those files in it that can belong to a model.

    Args:
        path: a file or folder, local or a URL; what is local already is not copied.
        scratch: an empty folder for what is downloaded.

    Raises:
        UserError: nothing is there.
    """
    if "://" not in path:
        local = Path(path)
        if not local.exists():
            raise UserError(f"there is no exported model at {path}; give a model.safetensors or a folder that holds one")
        return local
    location, mark, query = path.partition("?")
    folder, lone = Folder(path), location.endswith(MODEL_ENDINGS)
    if lone:
        parent, _, name = location.rpartition("/")
        folder, wanted = Folder(parent + mark + query), [name]
    else:
        wanted = [*FOLDER_FILES, "model-*.safetensors"]  # the parts of a large Hugging Face model
    found = [name for name in folder.names() if any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)]
    if not found:
        raise UserError(f"there is no exported model at {path}")
    for name in found:
        folder.download(name, scratch / name)
    return scratch / found[0] if lone else scratch
