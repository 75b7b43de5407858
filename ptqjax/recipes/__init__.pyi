from ptqjax.recipes.replaying import replay as replay
from ptqjax.recipes.run import run_recipe as run_recipe
