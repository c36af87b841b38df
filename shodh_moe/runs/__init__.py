"""Run the stages of the main job: their checks and plans, the run folder, and the programs that ranks execute."""
