from ptqjax.recipes.recipe import Recipe as Recipe
from ptqjax.recipes.replaying import Replay as Replay
from ptqjax.recipes.replaying import replay as replay
from ptqjax.recipes.run import Run as Run
from ptqjax.recipes.run import StageRun as StageRun
from ptqjax.recipes.run import run_recipe as run_recipe
