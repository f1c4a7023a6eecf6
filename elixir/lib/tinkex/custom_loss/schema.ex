defmodule Tinkex.CustomLoss.Schema do
  @moduledoc false
  # What a set of options may hold. A schema is a keyword list with an entry an option:
  #
  #     workers: [type: :pos_integer, default: 1, doc: "how many Python processes."]
  #
  # with `required: true` for one that has no default, and `secret: true` for one whose values may
  # not be shown. The types stand at the end of this file; some also bring a value into its one form.

  @type t :: [{atom(), keyword()}]

  @doc """
  The options as a map, with a default for each that was not given.

  `given` is a keyword list. Raises `ArgumentError` with a sentence about `where`.
  """
  @spec validate!(keyword(), t(), String.t()) :: map()
  def validate!(given, schema, where) do
    unless keyword?(given) do
      raise ArgumentError, "#{where} takes a keyword list of options, got: #{inspect(given)}"
    end

    keys = Keyword.keys(given)
    for key <- keys, not Keyword.has_key?(schema, key), do: unknown!(key, schema, where)

    with [key | _] <- keys -- Enum.uniq(keys),
         do: raise(ArgumentError, "#{where} was given #{inspect(key)} twice")

    Map.new(schema, fn {key, option} -> {key, option!(key, option, given, schema, where)} end)
  end

  @doc """
  The same of a map or keyword list, whose keys are atoms or strings: `what` is a thing, as in
  "expected a regularizer to be a map".
  """
  @spec validate_map!(map() | keyword(), t(), String.t(), String.t()) :: map()
  def validate_map!(given, schema, what, where) do
    unless keyword?(given) or plain_map?(given) do
      raise ArgumentError,
            "expected #{what} to be a map or keyword list with #{listed(required(schema))}, " <>
              "got: #{inspect(given)}"
    end

    known = Map.new(schema, fn {key, _option} -> {Atom.to_string(key), key} end)
    pairs = Enum.map(given, fn {key, value} -> {Map.get(known, key, key), value} end)
    for {key, _value} <- pairs, not is_atom(key), do: unknown!(key, schema, where)
    validate!(pairs, schema, where)
  end

  @spec unknown!(term(), t(), String.t()) :: no_return()
  defp unknown!(key, schema, where) do
    raise ArgumentError,
          "#{where} has no option #{inspect(key)}; its options are #{inspect(Keyword.keys(schema))}"
  end

  defp option!(key, option, given, schema, where) do
    case Keyword.fetch(given, key) do
      {:ok, value} ->
        case cast(option[:type], value) do
          {:ok, value} ->
            value

          {:expected, expected} ->
            raise ArgumentError,
                  "invalid value for :#{key} of #{where}: expected #{expected}, " <>
                    "got: #{inspect(shown(option, value))}"
        end

      :error ->
        if option[:required] do
          raise ArgumentError, "#{where} lacks :#{key}; it needs #{listed(required(schema))}"
        end

        option[:default]
    end
  end

  defp required(schema), do: for({key, option} <- schema, option[:required], do: key)

  defp listed([key]), do: inspect(key)

  defp listed(keys) do
    {last, others} = List.pop_at(keys, -1)
    Enum.map_join(others, ", ", &inspect/1) <> " and " <> inspect(last)
  end

  # The names alone: what was given may end in a log.
  defp shown(option, value) do
    if option[:secret] && (proper?(value) or is_map(value)),
      do: for(variable <- value, do: with({name, _value} <- variable, do: name)),
      else: value
  end

  @doc "The option that a regularizer and the base loss have alike."
  @spec reduction() :: keyword()
  def reduction do
    [
      type: {:name_of, ~w(token_sum token_mean sequence_mean_token_mean sequence_mean_token_sum)},
      doc: "what becomes of the numbers of a built-in term, or one written with `@term`: \
`:token_sum`, which is its default, `:token_mean`, `:sequence_mean_token_mean` or \
`:sequence_mean_token_sum`, as atoms or strings."
    ]
  end

  @doc "The schema in Markdown: an item an option."
  @spec docs(t()) :: String.t()
  def docs(schema) do
    Enum.map_join(schema, "\n", fn {key, option} ->
      default =
        cond do
          option[:required] -> " Required."
          Keyword.has_key?(option, :default) -> " Defaults to `#{inspect(option[:default])}`."
          true -> ""
        end

      "  * `:#{key}` - #{option[:doc]}#{default}\n"
    end)
  end

  @doc "Whether it is a list that ends, as `length/1` and `Enum` need."
  @spec proper?(term()) :: boolean()
  def proper?(value), do: is_list(value) and not List.improper?(value)

  defp keyword?(value), do: proper?(value) and Keyword.keyword?(value)
  defp plain_map?(value), do: is_map(value) and not is_struct(value)

  # Types. What was expected, or the value.

  @doc "A value of a type, in the form that it is kept in, or what was expected instead."
  @spec cast(term(), term()) :: {:ok, term()} | {:expected, String.t()}
  def cast(:any, value), do: {:ok, value}

  def cast(:pos_integer, value),
    do: check(value, is_integer(value) and value > 0, "a positive integer")

  def cast(:non_neg_integer, value),
    do: check(value, is_integer(value) and value >= 0, "an integer that is not negative")

  def cast({:integer, low, high}, value) do
    check(value, is_integer(value) and value in low..high, "an integer from #{low} to #{high}")
  end

  def cast(:integer, value), do: check(value, is_integer(value), "an integer")
  def cast(:boolean, value), do: check(value, is_boolean(value), "true or false")
  def cast(:keyword, value), do: check(value, keyword?(value), "a keyword list")

  def cast({:in, allowed}, value),
    do: check(value, value in allowed, "one of #{Enum.map_join(allowed, ", ", &inspect/1)}")

  def cast(:milliseconds, value) do
    valid? = is_nil(value) or (is_integer(value) and value > 0)
    check(value, valid?, "a positive number of milliseconds or nil")
  end

  def cast(:bytes, :infinity), do: {:ok, :infinity}

  def cast(:bytes, value) do
    valid? = is_integer(value) and value > 0
    check(value, valid?, "a positive number of bytes or :infinity")
  end

  # A receive takes no longer ones.
  @longest 0xFFFF_FFFF

  def cast(:timeout, :infinity), do: {:ok, :infinity}

  def cast(:timeout, value) when is_integer(value) and value > @longest,
    do: {:expected, "at most #{@longest} milliseconds, or :infinity"}

  def cast(:timeout, value) do
    valid? = is_integer(value) and value > 0
    check(value, valid?, "a positive number of milliseconds or :infinity")
  end

  def cast(:name, {:global, _term} = name), do: {:ok, name}
  def cast(:name, {:via, module, _term} = name) when is_atom(module), do: {:ok, name}

  def cast(:name, value) do
    valid? = is_atom(value) and value not in [nil, true, false]
    check(value, valid?, "an atom, {:global, term} or {:via, module, term}")
  end

  def cast(:executable, value),
    do: check(value, string?(value), "a path or the name of a program")

  def cast(:string, value), do: check(value, string?(value), "a string that is not empty")

  def cast(:directory, value),
    do: check(value, string?(value) and File.dir?(value), "a directory that exists")

  # What the worker is told: the directory as an absolute path, `keep` as Python's Recorder has it.
  def cast(:record, nil), do: {:ok, nil}

  def cast(:record, value) do
    expected =
      {:expected,
       "[dir: path], with keep: :failures, {:every, n} or :all and keep_bytes: a positive integer"}

    if keyword?(value) and Keyword.keys(value) -- [:dir, :keep, :keep_bytes] == [] do
      bytes = Keyword.get(value, :keep_bytes, 256_000_000)

      with dir when is_binary(dir) and dir != "" <- value[:dir],
           keep when is_binary(keep) <- keep(Keyword.get(value, :keep, :failures)),
           true <- is_integer(bytes) and bytes > 0 do
        {:ok, %{dir: Path.expand(dir), keep: keep, keep_bytes: bytes}}
      else
        _other -> expected
      end
    else
      expected
    end
  end

  def cast(:strings, value),
    do: check(value, proper?(value) and Enum.all?(value, &string?/1), "a list of strings")

  def cast({:list_of, allowed}, value) do
    valid? = proper?(value) and Enum.all?(value, &(&1 in allowed))
    check(value, valid?, "a list of #{Enum.map_join(allowed, ", ", &inspect/1)}")
  end

  def cast(:torch, value) do
    valid? = value in [:default, :cpu] or (string?(value) and value =~ ~r/\A\s*[=<>!~]=?\s*\d/)
    check(value, valid?, ~s(:default, :cpu or a version such as "==2.13.0"))
  end

  def cast(:env, value) do
    valid? = (proper?(value) or plain_map?(value)) and Enum.all?(value, &variable?/1)

    check(
      value,
      valid?,
      "a map or list of {name, value}, both strings, the value nil to remove a variable"
    )
  end

  def cast(:backoff, value) do
    valid? =
      match?(
        {first, longest}
        when is_integer(first) and is_integer(longest) and first > 0 and longest >= first,
        value
      )

    check(
      value,
      valid?,
      "{first, longest} in milliseconds, both positive, the second not the smaller"
    )
  end

  # How Elixir names things, which the wire has as strings.

  def cast(:label, value) when is_atom(value) and value not in [nil, true, false],
    do: {:ok, Atom.to_string(value)}

  def cast(:label, value) do
    valid? = is_binary(value) and String.valid?(value) and String.trim(value) != ""
    check(value, valid?, "a string that is not empty, or an atom")
  end

  def cast(:term, value) when is_atom(value) and value not in [nil, true, false],
    do: {:ok, Atom.to_string(value)}

  def cast(:term, value) do
    valid? = is_binary(value) and value != "" and String.valid?(value)
    check(value, valid?, ~s(the atom of a built-in term, such as :l2, or "module:function"))
  end

  def cast(:totals, value) do
    valid? = value == nil or (plain_map?(value) and value != %{})
    check(value, valid?, "the map that Tinkex.CustomLoss.totals/3 has in its {:ok, totals}")
  end

  def cast({:name_of, _allowed}, nil), do: {:ok, nil}

  # What is most like it comes first.
  def cast({:name_of, allowed}, value) do
    given = if is_atom(value), do: Atom.to_string(value), else: value

    cond do
      given in allowed ->
        {:ok, given}

      is_binary(given) ->
        nearest = Enum.sort_by(allowed, &(-String.jaro_distance(&1, given)))
        {:expected, "one of " <> Enum.map_join(nearest, ", ", fn name -> ":#{name}" end)}

      true ->
        {:expected, "one of " <> Enum.map_join(allowed, ", ", &":#{&1}")}
    end
  end

  def cast(:params, value) do
    if plain_map?(value) or keyword?(value),
      do: {:ok, Map.new(value, fn {name, param} -> {name, param(param)} end)},
      else: {:expected, "a map or keyword list"}
  end

  def cast(:weight, value) do
    check(
      value,
      is_number(value) or is_function(value, 1),
      "a finite number, or a function of the step"
    )
  end

  # A parameter that is an atom is the text of it, but for those that MessagePack has values for.
  @values [nil, true, false, :nan, :infinity, :neg_infinity]

  defp param(atom) when is_atom(atom) and atom not in @values, do: Atom.to_string(atom)

  defp param(value) when is_list(value),
    do: if(proper?(value), do: Enum.map(value, &param/1), else: value)

  defp param(%{} = map) when not is_struct(map),
    do: Map.new(map, fn {key, value} -> {key, param(value)} end)

  defp param(value), do: value

  defp check(value, true, _expected), do: {:ok, value}
  defp check(_value, false, expected), do: {:expected, expected}

  # A zero byte would end the string for the operating system, and a port's environment is text.
  defp string?(value) do
    is_binary(value) and value != "" and String.valid?(value) and
      not String.contains?(value, <<0>>)
  end

  defp variable?({name, value}) do
    string?(name) and not String.contains?(name, "=") and
      (value in [nil, ""] or string?(value))
  end

  defp variable?(_other), do: false

  defp keep(kind) when kind in [:failures, :all], do: Atom.to_string(kind)
  defp keep({:every, n}) when is_integer(n) and n > 0, do: "every:#{n}"
  defp keep(_other), do: nil
end
