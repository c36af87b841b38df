"""Import a user's arrays into the_well's schema, as described by a mapping file."""

from shodh_moe.data.importing.mapping import Mapping, load_mapping
from shodh_moe.data.importing.run import import_data

__all__ = ["Mapping", "import_data", "load_mapping"]
