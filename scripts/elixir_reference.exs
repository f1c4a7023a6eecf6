# The page of the site with the Elixir modules, from their docs; `make site` writes it. ExDoc, which makes
# what Hex publishes, is not there without Hex.

defmodule ElixirReference do
  @app :tinkex_custom_loss

  @doc "Writes it as Markdown."
  def write(path) do
    File.mkdir_p!(Path.dirname(path))
    File.write!(path, page())
  end

  def page do
    """
    # Elixir reference

    All public modules, from their docs: what `h Tinkex.CustomLoss` shows in IEx. The terms have [a page of their
    own](terms.md), and so has [the record of a step](record.md).

    #{Enum.map_join(modules(), "\n", &section/1)}
    """
  end

  # Of what is written on the wire, the forms that callers give.
  @forms [Tinkex.CustomLoss.Wire.Data, Tinkex.CustomLoss.Wire.Tensor]

  @doc "The modules that have docs, what is called first before what it returns and raises."
  def modules do
    Application.load(@app)
    {:ok, modules} = :application.get_key(@app, :modules)

    modules
    |> Enum.reject(&(wire?(&1) and &1 not in @forms))
    |> Enum.filter(&match?({:docs_v1, _, _, _, %{"en" => _}, _, _}, Code.fetch_docs(&1)))
    |> Enum.sort_by(&{rank(&1), inspect(&1)})
  end

  defp rank(Tinkex.CustomLoss), do: 0

  defp rank(module) do
    cond do
      task?(module) -> 4
      wire?(module) -> 3
      function_exported?(Code.ensure_loaded!(module), :exception, 1) -> 2
      true -> 1
    end
  end

  defp task?(module), do: String.starts_with?(inspect(module), "Mix.Tasks.")
  defp wire?(module), do: String.starts_with?(inspect(module), "Tinkex.CustomLoss.Wire.")

  defp section(module) do
    {:docs_v1, _, _, _, %{"en" => doc}, _, entries} = Code.fetch_docs(module)
    documented = for {{kind, _, _}, _, _, %{"en" => _}, _} = entry <- entries, do: {kind, entry}

    [
      "## #{title(module)}\n\n",
      below(doc, "##"),
      for({:type, entry} <- documented, do: type(module, entry)),
      for(
        {kind, entry} <- documented,
        kind in [:function, :macro, :callback],
        do: function(module, entry)
      )
    ]
    |> IO.iodata_to_binary()
  end

  defp title(module),
    do: if(task?(module), do: "mix #{Mix.Task.task_name(module)}", else: inspect(module))

  defp type(module, {{:type, name, arity}, _, _, %{"en" => doc}, _}) do
    {:ok, types} = Code.Typespec.fetch_types(module)

    [shown] =
      for {kind, {^name, _, args} = type} <- types, length(args) == arity do
        quoted = Code.Typespec.type_to_quoted(type)
        quoted = if kind == :opaque, do: quoted |> elem(2) |> hd(), else: quoted
        "@#{kind} #{Macro.to_string(quoted)}"
      end

    entry("t:#{name}/#{arity}", [shown], doc)
  end

  defp function(module, {{_kind, name, arity}, _, signature, %{"en" => doc}, metadata}) do
    specs =
      with {:ok, specs} <- Code.Typespec.fetch_specs(module),
           {_, specs} <- List.keyfind(specs, {name, arity}, 0) do
        for spec <- specs,
            do: "@spec " <> Macro.to_string(Code.Typespec.spec_to_quoted(name, spec))
      else
        _none -> []
      end

    least = arity - Map.get(metadata, :defaults, 0)
    title = if least == arity, do: "#{name}/#{arity}", else: "#{name}/#{least}..#{arity}"
    entry(title, signature ++ specs, doc)
  end

  defp entry(title, code, doc) do
    code = code |> Enum.join("\n") |> formatted()
    "### #{title}\n\n```elixir\n#{code}\n```\n\n#{below(doc, "###")}"
  end

  defp formatted(code) do
    code |> Code.format_string!(line_length: 88) |> IO.iodata_to_binary()
  rescue
    _no_code -> code
  end

  # Its headings belong under the one above it; in blocks of code there are none.
  defp below(doc, level) do
    doc |> String.trim() |> String.replace(~r/^(#+ )/m, "#{level}\\1") |> Kernel.<>("\n\n")
  end
end
