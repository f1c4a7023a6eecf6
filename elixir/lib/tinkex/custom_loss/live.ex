defmodule Tinkex.CustomLoss.Live do
  @moduledoc """
  What each term does, step by step, while training goes on.

      live = Tinkex.CustomLoss.Live.new(total: 200)

      Enum.reduce(steps, live, fn step, live ->
        {:ok, output} = ...
        Tinkex.CustomLoss.Live.put(live, output)
      end)
      |> Tinkex.CustomLoss.Live.finish()

  or, around any enumerable of outputs or records, `watch/2`; or, where the loop is not yours to
  change, `start_link/1`, which draws what a pool computes, whoever asks it. On a terminal it is a table that is
  drawn anew with every step, and leaves out what its columns have no room for:

      8/200 steps  loss 2.157  ██▆▅▃▂▁▁  |∇| 0.041  0:05 left
      term       value  weight  w·value  share         w·|∇|    cos  trend
      base_loss  1.557            1.557  ██████      0.03125  +0.92  █▇▅▅▃▂▁▁
      kl         0.083     0.1   0.0083             0.002551  -0.31  ▁▁▂▃▃▅▆█

  What else is written to the terminal meanwhile, such as a line of the log, is drawn over: have the log
  in a file, or give `ansi: false`.

  Elsewhere it is a plain line of at most 80 columns for some of the steps, and the table once at the
  end. Norms and cosines are with respect to the logprobs; `share` is the part of all contributions,
  each without its sign.
  """

  alias Tinkex.CustomLoss.Live.Follower
  alias Tinkex.CustomLoss.{Output, Schema, Telemetry}

  @columns 80
  @share 8
  @trend 10
  @kept 24
  @plain_lines 12
  # Of the table, where a terminal is narrower: the first of them first.
  @left_out ["share", "value", "weight", "w·|∇|", "cos"]
  @levels String.graphemes("▁▂▃▄▅▆▇█")
  @eighths String.graphemes(" ▏▎▍▌▋▊▉")

  @options [
    total: [
      type: :pos_integer,
      doc: "how many steps there will be, for progress and the time that is left."
    ],
    device: [type: :any, default: :stdio, doc: "where it is drawn, an `t:IO.device/0`."],
    ansi: [
      type: :boolean,
      doc: "whether that is a terminal. By default, whether `IO.ANSI.enabled?/0` says so."
    ]
  ]

  @follow [pool: [type: :any, required: true, doc: "the name of the pool."]]

  @enforce_keys [:device, :total, :ansi, :started]
  defstruct [
    :device,
    :total,
    :ansi,
    :started,
    columns: @columns,
    count: 0,
    drawn: 0,
    record: nil,
    losses: [],
    values: %{}
  ]

  @opaque t :: %__MODULE__{}

  @doc """
  A table of nothing yet.

  #{Schema.docs(@options)}
  """
  @spec new(keyword()) :: t()
  def new(opts \\ []) do
    options = Schema.validate!(opts, @options, "Tinkex.CustomLoss.Live.new/1")
    ansi = if options[:ansi] == nil, do: IO.ANSI.enabled?(), else: options.ansi
    started = System.monotonic_time(:millisecond)
    %__MODULE__{device: options.device, total: options[:total], ansi: ansi, started: started}
  end

  @doc "Shows one more step: an output, or the record in its `record` or in a step's metrics."
  @spec put(t(), Output.t() | map()) :: t()
  def put(live, %Output{record: record}), do: put(live, record)

  def put(%__MODULE__{} = live, %{"loss_total" => loss} = record) do
    live = %{
      live
      | count: live.count + 1,
        columns: columns(live),
        record: record,
        losses: keep(loss, live.losses),
        values: Map.new(terms(record), fn {n, t} -> {n, keep(t["value"], live.values[n])} end)
    }

    cond do
      live.ansi -> redraw(live)
      rem(live.count - 1, every(live)) == 0 -> print(live, [line(live)])
      true -> live
    end
  end

  @doc "Ends it: where there is no terminal, the table is printed now."
  @spec finish(t()) :: :ok
  def finish(%__MODULE__{ansi: false, count: count} = live) when count > 0 do
    print(live, ["" | table(live)])
    :ok
  end

  def finish(%__MODULE__{}), do: :ok

  @doc "Hands on an enumerable of outputs or records, and shows each; options as of `new/1`."
  @spec watch(Enumerable.t(), keyword()) :: Enumerable.t()
  def watch(outputs, opts \\ []) do
    live = new(opts)

    Stream.transform(
      outputs,
      fn -> %{live | started: System.monotonic_time(:millisecond)} end,
      fn output, live -> {[output], put(live, output)} end,
      &finish/1
    )
  end

  @doc """
  Starts a process that draws every computation of a pool, from its events (`:telemetry`).

      children = [{Tinkex.CustomLoss, name: MyLoss}, {Tinkex.CustomLoss.Live, pool: MyLoss}]

  Callers only send it the record. When it ends, by `GenServer.stop/1` or with its supervisor, it
  draws what has come and ends the table. Raises `ArgumentError` if the library `:telemetry` is not
  there.

  ## Options

  Those of `new/1`, and

  #{Schema.docs(@follow)}
  """
  @spec start_link(keyword()) :: GenServer.on_start()
  def start_link(opts) do
    options = Schema.validate!(opts, @follow ++ @options, "Tinkex.CustomLoss.Live.start_link/1")
    Telemetry.available!()
    GenServer.start_link(Follower, {options.pool, Keyword.delete(opts, :pool)})
  end

  @doc false
  def child_spec(opts),
    do: %{id: {__MODULE__, opts[:pool]}, start: {__MODULE__, :start_link, [opts]}}

  # Of a terminal as many as it has now: a row that is wrapped is two, and not drawn over.
  defp columns(%{ansi: true, device: device}) do
    case :io.columns(erlang_device(device)) do
      {:ok, columns} -> min(columns, @columns)
      {:error, _no_terminal} -> @columns
    end
  end

  defp columns(_live), do: @columns

  defp erlang_device(:stdio), do: :standard_io
  defp erlang_device(:stderr), do: :standard_error
  defp erlang_device(device), do: device

  defp keep(value, kept), do: Enum.take([value | kept || []], @kept)

  defp every(%{total: nil}), do: 10
  defp every(%{total: total}), do: max(1, div(total, @plain_lines))

  defp terms(record) do
    base = if record["base_loss"], do: [{"base_loss", record["base_loss"]}], else: []
    base ++ Enum.sort(record["regularizers"] || %{})
  end

  defp print(live, lines) do
    IO.puts(live.device, Enum.intersperse(lines, "\n"))
    live
  end

  # Over what was drawn before.
  defp redraw(live) do
    lines = [heading(live) | table(live)]
    up = if live.drawn > 0, do: IO.ANSI.cursor_up(live.drawn), else: ""
    lines_anew = for line <- lines, do: [IO.ANSI.clear_line(), line, "\n"]
    IO.write(live.device, [up, lines_anew])
    %{live | drawn: length(lines)}
  end

  defp heading(live) do
    at = if live.total, do: "#{live.count}/#{live.total} steps", else: "step #{live.count}"
    norm = figure(live.record["total_grad_norm"])
    trend = trend(live.losses, @kept)
    heading = "#{at}  loss #{figure(hd(live.losses))}  #{trend}  |∇| #{norm}"
    timed = heading <> left(live)

    cond do
      String.length(timed) <= live.columns -> timed
      String.length(heading) <= live.columns -> heading
      true -> String.slice(heading, 0, live.columns - 1) <> "…"
    end
  end

  defp left(%{total: nil}), do: ""

  defp left(live) do
    elapsed = System.monotonic_time(:millisecond) - live.started
    seconds = round(elapsed / live.count * max(0, live.total - live.count) / 1000)
    rest = seconds |> rem(60) |> Integer.to_string() |> String.pad_leading(2, "0")
    "  #{div(seconds, 60)}:#{rest} left"
  end

  # The loss, and what each term added to it.
  defp line(live) do
    step = String.pad_leading("#{live.count - 1}", 5)
    cells = for {name, term} <- terms(live.record), do: "#{name} #{figure(contribution(term), 3)}"
    fit(cells, "#{step}  loss #{figure(live.record["loss_total"])} =", " ")
  end

  defp fit([], line, _sign), do: line

  defp fit([cell | rest] = cells, line, sign) do
    longer = line <> sign <> cell
    more = "#{length(cells)} more"
    room = if rest == [], do: @columns, else: @columns - String.length(" + " <> more)

    if String.length(longer) <= room,
      do: fit(rest, longer, " + "),
      else: line <> sign <> more
  end

  defp contribution(term), do: term["contribution"] || term["value"]

  defp table(live) do
    terms = terms(live.record)
    whole = terms |> Enum.map(fn {_name, term} -> size(contribution(term)) end) |> Enum.sum()
    heads = ["term", "value", "weight", "w·value", "share", "w·|∇|", "cos"]

    rows =
      for {name, term} <- terms do
        [
          name |> String.slice(0, 16),
          figure(term["value"]),
          if(term["weight"], do: figure(term["weight"]), else: ""),
          figure(contribution(term)),
          bar(size(contribution(term)), whole),
          figure(term["grad_norm_weighted"] || term["grad_norm"]),
          cosine(term)
        ]
      end

    columns = [heads | rows] |> Enum.zip_with(& &1) |> fitting(live.columns)
    # What is left of the line.
    width = min(@trend, live.columns - taken(columns) - 1)
    trends = ["trend" | for({name, _term} <- terms, do: trend(live.values[name], width))]
    columns = if width < 5, do: columns, else: columns ++ [trends]

    columns
    |> Enum.map(&column(&1, live.ansi))
    |> Enum.zip_with(&(&1 |> Enum.join(" ") |> String.trim_trailing()))
  end

  # Without those that there is no room for.
  defp fitting(columns, room) do
    Enum.reduce(@left_out, columns, fn head, columns ->
      if taken(columns) <= room, do: columns, else: Enum.reject(columns, &(hd(&1) == head))
    end)
  end

  # A space goes between two.
  defp taken(columns), do: Enum.sum(Enum.map(columns, &(1 + width(&1)))) - 1

  defp width(cells), do: cells |> Enum.map(&String.length/1) |> Enum.max()

  # Words to the left, numbers to the right; the cosines in colour.
  defp column([head | _cells] = cells, ansi) do
    width = width(cells)
    left = head in ["term", "share", "trend"]
    pad = if left, do: &String.pad_trailing/2, else: &String.pad_leading/2
    cells = Enum.map(cells, &pad.(&1, width))
    if ansi and head == "cos", do: Enum.map(cells, &colour/1), else: cells
  end

  defp colour(cell) do
    case Float.parse(String.trim(cell)) do
      {cosine, ""} when cosine > 0.1 ->
        IO.ANSI.format_fragment([:green, cell, :default_color], true)

      {cosine, ""} when cosine < -0.1 ->
        IO.ANSI.format_fragment([:red, cell, :default_color], true)

      _other ->
        cell
    end
    |> IO.iodata_to_binary()
  end

  defp cosine(%{"skipped" => true}), do: "skipped"

  defp cosine(%{"cosine_to_total" => cosine}) when is_number(cosine) do
    text = :erlang.float_to_binary(cosine / 1, decimals: 2)
    if cosine >= 0, do: "+" <> text, else: text
  end

  defp cosine(_term), do: "-"

  defp size(number) when is_number(number), do: abs(number)
  defp size(_nothing), do: 0

  defp bar(_size, whole) when whole == 0, do: ""

  defp bar(size, whole) do
    eighths = round(size / whole * @share * 8)
    rest = if rem(eighths, 8) > 0, do: Enum.at(@eighths, rem(eighths, 8)), else: ""
    String.duplicate("█", div(eighths, 8)) <> rest
  end

  # The last values, the latest first, between their least and greatest; ? where one is no number.
  defp trend(values, width) do
    values = values |> Enum.take(width) |> Enum.reverse()
    {low, high} = values |> Enum.filter(&is_number/1) |> Enum.min_max(fn -> {0, 0} end)

    for value <- values, into: "" do
      cond do
        not is_number(value) -> "?"
        high == low -> hd(@levels)
        true -> Enum.at(@levels, round((value - low) / (high - low) * 7))
      end
    end
  end

  # In at most nine columns.
  defp figure(number, digits \\ 4)
  defp figure(nil, _digits), do: "-"
  defp figure(atom, _digits) when is_atom(atom), do: Atom.to_string(atom)
  defp figure(zero, _digits) when zero == 0, do: "0"

  defp figure(number, digits) do
    magnitude = number |> abs() |> :math.log10() |> floor()

    if magnitude in -4..4 do
      text = :erlang.float_to_binary(number / 1, decimals: max(0, digits - 1 - magnitude))

      if text =~ ".",
        do: text |> String.trim_trailing("0") |> String.trim_trailing("."),
        else: text
    else
      :erlang.float_to_binary(number / 1, scientific: 2)
    end
  end
end
