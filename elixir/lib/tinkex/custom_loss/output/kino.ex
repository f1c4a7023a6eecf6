# In Livebook an output shows as it is inspected, in a column width of its own. Kino is there to compile
# with where it is a dependency, and where not, nothing is missing.
if match?({:module, _}, Code.ensure_compiled(Kino.Render)) do
  defimpl Kino.Render, for: Tinkex.CustomLoss.Output do
    def to_livebook(output) do
      text = Kernel.inspect(output, limit: :infinity)
      fence = String.duplicate("`", longest_run(text) + 3)

      [fence, "text\n", text, "\n", fence]
      |> IO.iodata_to_binary()
      |> then(&apply(Kino.Markdown, :new, [&1]))
      |> Kino.Render.to_livebook()
    end

    # No name of a term ends the block.
    defp longest_run(text),
      do:
        Regex.scan(~r/`+/, text)
        |> Enum.map(fn [run] -> byte_size(run) end)
        |> Enum.max(fn -> 0 end)
  end
end
