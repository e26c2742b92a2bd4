# Writes a Metal source with the files of native/ that it includes in their place: libraries are compiled from one text.
#
#   cmake -DIN=FILE -DOUT=FILE [-DKEEP=NAME] -P flatten.cmake
#
# KEEP: an include that stays

set(native ${CMAKE_CURRENT_LIST_DIR}/..)

file(READ ${IN} text)
set(kept "")
while (text MATCHES "#include \"([^\"]+)\"[^\n]*\n")
    set(line "${CMAKE_MATCH_0}")
    set(name "${CMAKE_MATCH_1}")
    if (name STREQUAL "${KEEP}")
        string(APPEND kept "${line}")
        set(part "")
    elseif (EXISTS ${native}/${name})
        file(READ ${native}/${name} part)
    elseif (EXISTS ${native}/simt/${name})
        file(READ ${native}/simt/${name} part)
    else()
        message(FATAL_ERROR "${IN} includes ${name}, which is not in native/")
    endif()
    string(REPLACE "${line}" "${part}" text "${text}")
endwhile()
file(WRITE ${OUT} "${kept}${text}")
