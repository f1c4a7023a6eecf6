# What has the tag :tinkex needs the real one: see @tinkex in mix.exs.
tinkex? = Code.ensure_loaded?(Tinkex.TrainingClient)
if tinkex?, do: {:ok, _} = Application.ensure_all_started(:tinkex)
ExUnit.start(capture_log: true, exclude: if(tinkex?, do: [], else: [:tinkex]))
