"""Settings: what they are, how they are read, and what the command line leaves open."""

from sparsejax.config.parse import ConfigError as ConfigError
from sparsejax.config.parse import find_differences as find_differences
from sparsejax.config.parse import list_settings as list_settings
from sparsejax.config.parse import parse_config as parse_config
from sparsejax.config.schema import TrainConfig as TrainConfig
from sparsejax.config.schema import make_recipe as make_recipe
from sparsejax.config.schema import make_transformer_config as make_transformer_config
